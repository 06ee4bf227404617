"""Every native family over a gang gives what it gives alone, in every way to divide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_families import tiled
from tests.parallel.cases import CASES, FIVE_HEADS, LAYOUTS, SHORT, requests
from tests.parallel.ranks import ENGINES, Made, bytes_sent, decoded, encoders, generated, inside
from tests.parallel.workers import Workers
from vidgen.parallel.layout import Layout
from vidgen.types import Request

STEP, FRAMES = 1e-4, 1e-3
"""Of a prediction, and of frames after the whole loop: sums of attention in other blocks, and what a few guided steps
make of them."""
SLOW = {"cfg_2_x_ring_2": Layout(cfg=2, ring=2), "ring_3": Layout(ring=3)}
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    @cache
    def once(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.replace("/", "-"))
        CASES[name].write(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def asked(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Request]]:
    """Requests for a case, one a seed."""

    def make(name: str, seeds: tuple[int, ...] = (7,), **changes: Any) -> list[Request]:
        return requests(name, checkpoint(name), tmp_path_factory.mktemp("media"), seeds, **changes)

    return make


@pytest.fixture(scope="session")
def alone(checkpoint: Checkpoint, asked: Callable[..., list[Request]]) -> Callable[..., tuple[list[Request], Made]]:
    """Requests for a case and what one process makes of them."""

    @cache
    def once(name: str, seeds: tuple[int, ...] = (7,)) -> tuple[list[Request], Made]:
        wanted = asked(name, seeds)
        return wanted, generated(None, str(checkpoint(name)), CASES[name].task, wanted)

    return once


def check(name: str, layout: Layout, found: list[Made], expected: Made) -> None:
    for rank, made in enumerate(found):
        half = layout.place(rank)[0]
        branches = expected.predictions
        divided = layout.cfg == 2 and len(branches) == 2
        wanted = branches[half : half + 1] if divided else branches
        assert len(made.predictions) == len(wanted), f"rank {rank} predicts its own branch alone"
        for one, other in zip(made.predictions, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=STEP, atol=STEP)
        assert torch.equal(made.latents, found[0].latents), "the same latents everywhere"
        assert made.context == layout.context
        assert made.counts == expected.counts or rank
        assert made.encoded == (expected.encoded if rank == 0 else 0), "rank 0 alone encodes text"
        if rank:
            assert all(frames is None for frames in made.frames)
    for frames, other in zip(found[0].frames, expected.frames, strict=True):
        assert frames is not None and other is not None
        torch.testing.assert_close(frames, other, rtol=0, atol=FRAMES)
        assert float(other.std()) > 0.01, "a flat clip shows nothing"


def run(name: str, layout: Layout, workers: Workers, checkpoint: Checkpoint, alone: Any, **options: Any) -> list[Made]:
    wanted, expected = alone(name, **options)
    found = workers.run(layout, generated, str(checkpoint(name)), CASES[name].task, wanted)
    check(name, layout, found, expected)
    return found


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_gang_gives_what_one_process_gives(
    layout: Layout, name: str, workers: Workers, checkpoint: Checkpoint, alone: Any
) -> None:
    found = run(name, layout, workers, checkpoint, alone)
    if not name.startswith("allegro"):  # whose VAE knows tiles alone
        assert all(made.decoded_by_vae == 0 for made in found[1:]), "rank 0 alone decodes a whole picture"


@pytest.mark.parametrize("name", FIVE_HEADS)
def test_five_heads_over_four_ranks_give_what_one_process_gives(
    name: str, workers: Workers, checkpoint: Checkpoint, alone: Any
) -> None:
    run(name, Layout(ulysses=4), workers, checkpoint, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", {**LAYOUTS, **SLOW}.values(), ids={**LAYOUTS, **SLOW})
def test_a_gang_gives_what_one_process_gives_in_every_case(
    layout: Layout, name: str, workers: Workers, checkpoint: Checkpoint, alone: Any
) -> None:
    run(name, layout, workers, checkpoint, alone)


@pytest.mark.parametrize("name", ["hunyuan/t2v-true-cfg", "mochi/t2v", "ltx/i2v-0.9.5", "wan/dense_i2v"])
def test_a_batch_of_prompts_of_different_length_is_divided_too(
    name: str, workers: Workers, checkpoint: Checkpoint, alone: Any
) -> None:
    run(name, Layout(ring=2, ulysses=2), workers, checkpoint, alone, seeds=(7, 8))


READERS = {
    "wan/t2v": {"UMT5EncoderModel"},
    "wan/i2v": {"UMT5EncoderModel", "CLIPVisionModel"},
    "ltx/t2v-0.9.0": {"T5EncoderModel"},
    "cogvideox/t2v-2b": {"T5EncoderModel"},
    "hunyuan/i2v-token-replace": {"LlamaModel", "CLIPTextModel", "CLIPVisionModel"},
    "mochi/t2v": {"T5EncoderModel"},
    "allegro/t2v": {"T5EncoderModel"},
}


@pytest.mark.parametrize("name", READERS)
def test_rank_0_alone_has_the_networks_that_read_texts_and_pictures(
    name: str, workers: Workers, checkpoint: Checkpoint
) -> None:
    """In the whole process: what was let go again counts too, as long as anything holds it."""
    first, *others = workers.run(Layout(ring=2, ulysses=2), encoders, str(checkpoint(name)), CASES[name].task)
    assert first >= READERS[name], "and whatever earlier tests have loaded there"
    assert others == [set()] * 3


TILED = {
    "wan/t2v": {},
    "ltx/t2v-0.9.1": {"height": 96, "width": 128},
    "cogvideox/t2v-2b": {},
    "hunyuan/t2v": {},
    "mochi/t2v": {},
    "allegro/t2v": {"width": 176, "num_frames": 40},
}
"""Cases with more than one tile; that of LTX injects noise, which is drawn tile after tile."""


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("layout", [Layout(ring=2), Layout(cfg=2, ring=2)], ids=["2_ranks", "4_ranks"])
def test_tiles_decoded_by_several_ranks_are_bit_for_bit_those_of_one(
    layout: Layout, name: str, workers: Workers, checkpoint: Checkpoint, asked: Any
) -> None:
    (request,) = asked(name, **TILED[name])
    request = tiled(ENGINES[str(checkpoint(name)), CASES[name].task], request)
    arguments = (str(checkpoint(name)), CASES[name].task, request)
    expected, ran = decoded(None, *arguments)
    (found, own), *others = workers.run(layout, decoded, *arguments)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(chunks == [] for chunks, _ in others)
    assert own + sum(count for _, count in others) == ran, "each tile is decoded once"
    assert own < ran and all(count <= own for _, count in others)
    assert others[0][1] > 0


INSIDE = ("wan/5_heads", "ltx/t2v-0.9.0", "cogvideox/t2v-2b", "hunyuan/t2v", "mochi/t2v", "allegro/t2v")


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("layout", [Layout(ulysses=2), Layout(ring=4), Layout(ring=2, ulysses=2)], ids=str)
def test_a_rank_holds_its_share_of_tokens_two_blocks_of_keys_and_gathers_once(
    layout: Layout, name: str, workers: Workers, checkpoint: Checkpoint, asked: Any
) -> None:
    (request,) = asked(name)
    for rank, made in enumerate(workers.run(layout, inside, str(checkpoint(name)), CASES[name].task, request)):
        assert made["blocks"] == len(made["tokens"]) > 0
        assert all(count <= share for count, share in made["tokens"])
        calls = {"all_gather": 1}
        if layout.ulysses > 1:
            calls["all_to_all_single"] = 2 * made["blocks"]
        if layout.ring > 1:
            calls["batch_isend_irecv"] = (layout.ring - 1) * made["blocks"]
        assert made["calls"] == calls
        expected = Counter()
        for shape in made["shapes"]:
            expected.update(bytes_sent(layout, rank, shape))
        assert len(made["shapes"]) == made["blocks"]
        assert {kind: sent for kind, sent in made["sent"].items() if kind != "all_gather"} == expected
        assert made["alive"] <= 4, "keys and values of two blocks"
