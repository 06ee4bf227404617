"""A gang stays together: what rank 0 decides or meets reaches every rank, and the gang can be used again."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.wan.tiny_checkpoint import CASES, TRANSFORMER, build
from tests.parallel.ranks import ENGINES, disturbed, generated, loop_of, resumed, saved_states, sent_round
from tests.parallel.workers import Workers, free_port
from vidgen import engine
from vidgen.errors import ConfigError, GangError
from vidgen.loop import State
from vidgen.parallel.gang import Gang, join
from vidgen.parallel.layout import Layout
from vidgen.parallel.tree import put_together, take_apart
from vidgen.types import ModelSettings, Request

Prepared = tuple[str, str, Request]


@dataclass(frozen=True)
class Pair:
    first: torch.Tensor
    rest: Any


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A checkpoint, its task, and a request for it."""
    folder = build(
        tmp_path_factory.mktemp("wan"), transformer={"num_attention_heads": TRANSFORMER["num_attention_heads"]}
    )
    loop_of(str(folder), "t2v", None)
    model = ENGINES[str(folder), "t2v"]
    return str(folder), "t2v", model.request("a red circle", seed=5, **CASES["t2v"].sampling)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cancelled", "Cancelled: before step 2 of 4"),
        ("refused", "ItemError: a picture that nobody can read"),
        ("unreachable", "InfrastructureError: s3://states cannot be reached"),
        ("disk_full", "OSError: [Errno 28] No space left on device"),
        ("not_finite", "ItemError: latents after step 1 of 4 are not finite"),
    ],
)
@pytest.mark.parametrize("layout", [Layout(ring=2), Layout(cfg=2, ulysses=2)], ids=str)
def test_what_ends_a_batch_ends_it_on_every_rank_and_the_next_one_runs(
    layout: Layout, how: str, words: str, workers: Workers, prepared: Prepared
) -> None:
    for rank, (error, _, saved) in enumerate(workers.run(layout, disturbed, *prepared, how)):
        assert error.startswith(words), f"rank {rank}: {error}"
        assert saved == 0 or rank == 0
    made = workers.run(layout, disturbed, *prepared, "well")
    steps = prepared[2].num_inference_steps
    assert [error for error, _, _ in made] == [""] * layout.size
    assert [saved for _, _, saved in made] == [steps] + [0] * (layout.size - 1), "rank 0 alone saves"
    assert all(told >= steps for _, told, _ in made), "every rank has a heartbeat"


def test_a_state_saved_by_one_gang_goes_on_in_another_and_alone(workers: Workers, prepared: Prepared) -> None:
    whole = saved_states(None, *prepared)
    states = workers.run(Layout(ring=2, ulysses=2), saved_states, *prepared)[0]
    assert len(states) == len(whole) == 4
    later = [workers.run(layout, resumed, *prepared, states[1])[0] for layout in (Layout(cfg=2), Layout(ulysses=2))]
    for found in (*later, resumed(None, *prepared, states[1])):
        assert len(found) == 2, "steps that were left"
        last, wanted = State.from_bytes(found[-1]), State.from_bytes(whole[-1])
        torch.testing.assert_close(last.latents, wanted.latents, rtol=0, atol=1e-3)
        assert torch.equal(last.generators, wanted.generators)


def test_values_reach_every_rank_whatever_their_dtype_and_shape(workers: Workers) -> None:
    shared = torch.arange(5)
    value = {
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.bfloat16, torch.uint8, torch.int64)],
        "pair": Pair(shared, (shared, None, 1.5, "text", torch.float16)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(6).view(2, 3).T,
    }
    for found in workers.run(Layout(ring=2, ulysses=2), sent_round, value):
        assert [x.dtype for x in found["dtypes"]] == [x.dtype for x in value["dtypes"]]
        assert all(bool(x.all()) for x in found["dtypes"])
        assert torch.equal(found["pair"].first, shared)
        assert found["pair"].rest[1:] == value["pair"].rest[1:]
        assert float(found["scalar"]) == 2.5 and found["empty"].shape == (0, 3)
        assert torch.equal(found["strided"], value["strided"])


def test_a_tensor_that_occurs_twice_is_sent_once_and_stays_one() -> None:
    x = torch.ones(2)
    description, tensors = take_apart([x, {"again": x}, Pair(x, ())])
    assert len(tensors) == 1
    first, again, pair = put_together(description, tensors)
    assert first is again["again"] is pair.first


def test_a_value_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match="Generator"):
        take_apart([torch.Generator()])


def test_ranks_that_do_not_come_are_a_trouble_of_the_infrastructure() -> None:
    begun = time.monotonic()
    with pytest.raises(GangError, match="rank 0 of 2 did not meet"):
        join(0, Layout(ring=2), "127.0.0.1", free_port(), device="cpu", timeout=1)
    with pytest.raises(GangError, match="rank 1 of 2 did not meet"):
        join(1, Layout(ring=2), "127.0.0.1", free_port(), device="cpu", timeout=1)
    assert time.monotonic() - begun < 20, "and nobody waits for long"


def test_a_family_that_cannot_be_divided_is_refused_a_gang() -> None:
    gang = Gang(0, Layout(ring=2), torch.device("cpu"), None, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="testcard runs on one GPU"):
        engine.load_model(ModelSettings(family="testcard"), gang)


def test_one_process_calls_no_collective_and_does_not_even_import_them(prepared: Prepared, tmp_path: Path) -> None:
    checkpoint, _, _ = prepared
    code = f"""
import sys
import torch.distributed as dist
def called(*args, **kwargs): raise AssertionError("a collective")
for name in ("all_gather", "all_to_all_single", "batch_isend_irecv", "broadcast", "init_process_group", "new_group"):
    setattr(dist, name, called)
from vidgen import engine
model = engine.load({checkpoint!r})
request = model.request("a red circle", height=32, width=32, num_frames=5, num_inference_steps=1)
(video,) = model.generate([request])
assert sum(len(chunk) for chunk in video.chunks) == 5 and video.context == 1
assert "vidgen.parallel.gang" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_gang_loads_a_model_by_itself(workers: Workers, prepared: Prepared) -> None:
    """`load_model(settings, gang)` in a process that has loaded nothing yet; here: another checkpoint."""
    checkpoint, task, request = prepared
    made = workers.run(Layout(ulysses=2), generated, checkpoint, task, [request])
    assert [one.context for one in made] == [2, 2]
