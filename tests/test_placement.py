"""Which gang makes which shape: fits, refusals with their numbers, and what `parallel.degree: auto` chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_memory import Bound, bound
from vidgen import family, memory
from vidgen.config import JobConfig, ParallelConfig
from vidgen.config_rules import value_mistakes
from vidgen.errors import ConfigError
from vidgen.memory import GIB, Sizing
from vidgen.parallel.layout import Layout
from vidgen.placement import LARGEST, LONG_SECONDS, Placement, Planned
from vidgen.specs.gpus import GPUS


def placed(checkpoint: Bound, **parallel: Any) -> Placement:
    return Placement(checkpoint.sizing, parallel, checkpoint.spec.heads(checkpoint.params))


def fit(checkpoint: Bound, size: tuple[int, int, int], **parallel: Any) -> Any:
    request = checkpoint.request(*size)
    tokens, flops = (getattr(checkpoint.spec, name)(request, checkpoint.params) for name in ("tokens", "flops"))
    return placed(checkpoint, **parallel).of(Planned("a shape", request, tokens, flops))


def test_nothing_is_said_about_fit_without_a_gpu() -> None:
    assert fit(bound("Wan 14B"), (720, 1280, 81)) is None
    assert memory.sizing("testcard", family.spec("testcard"), None) is None


def test_seconds_are_operations_at_the_stated_share_of_the_data_sheet() -> None:
    """Wan 2.1 14B at 480 x 832 x 81 took 9.77 s a step of two forwards on an H100: the share is from there."""
    found = fit(bound("Wan 14B"), (480, 832, 81), gpu="H100")
    assert found.fits and found.smallest == 1 and found.seconds == pytest.approx(50 * 9.77, rel=0.01)
    eight = fit(bound("Wan 14B"), (480, 832, 81), gpu="H100", context=8)
    assert found.seconds / eight.seconds == pytest.approx(8 * 0.64)
    branches = fit(bound("Wan 14B"), (480, 832, 81), gpu="H100", cfg=2)
    assert found.seconds / branches.seconds == pytest.approx(2)
    alone = fit(bound("HunyuanVideo"), (512, 768, 121), gpu="H200", cfg=2)
    assert alone.seconds == fit(bound("HunyuanVideo"), (512, 768, 121), gpu="H200").seconds, "it has no second branch"


def needing_two(checkpoint: Bound, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an H100 just too small for one rank."""
    one, two = (checkpoint.sizing.need(checkpoint.request(*size), Layout(1, 1, u)).bytes for u in (1, 2))
    assert two < one
    middle = int((one + two) / 2 / (1 - memory.FRAGMENTATION)) + memory.CONTEXT_BYTES
    monkeypatch.setitem(GPUS, "H100", replace(GPUS["H100"], memory=middle))


def test_a_degree_that_does_not_fit_is_refused_with_the_smallest_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, size = bound("HunyuanVideo"), (720, 1280, 129)
    needing_two(checkpoint, size, monkeypatch)
    with pytest.raises(ConfigError, match=r"parallel.context: 1: a shape needs .* H100 .* smallest that fits: 2"):
        fit(checkpoint, size, gpu="H100", context=1)
    unsaid = fit(checkpoint, size, gpu="H100")
    assert unsaid.fits is False and unsaid.smallest == 2
    assert fit(checkpoint, size, gpu="H100", context=2).fits


def test_a_band_of_shapes_is_named_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, size = bound("HunyuanVideo"), (720, 1280, 129)
    needing_two(checkpoint, size, monkeypatch)
    bands = [{"tokens_above": 10_000, "context": 4}, {"tokens_above": 100_000, "context": 1}]
    with pytest.raises(ConfigError, match=r"parallel.by_shape\[1\].context: 1: a shape"):
        fit(checkpoint, size, gpu="H100", by_shape=bands)
    assert fit(checkpoint, size, gpu="H100", by_shape=bands[:1]).mesh.context == 4


def test_a_gpu_that_cannot_hold_it_at_any_degree_is_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"parallel.gpu: 'L4': .* \(weights .*\); allowed: B200, H200") as error:
        fit(bound("HunyuanVideo"), (720, 1280, 129), gpu="L4")
    assert "RTX-4090" not in str(error.value).partition("allowed")[2]


def test_more_ulysses_ranks_than_heads_are_refused_before_any_shape() -> None:
    with pytest.raises(ConfigError, match=r"parallel.ulysses: 16.* 12 attention heads"):
        placed(bound("Wan 1.3B"), ulysses=16)


def test_only_the_weights_are_known_of_a_backend_that_is_not_ours() -> None:
    small = Sizing({"unet": memory.Component(10, 20)}, None, {})
    large = Sizing({"unet": memory.Component(10, 200 * GIB)}, None, {})
    request = bound("Wan 1.3B").request(480, 832, 81)
    known = Placement(small, {"gpu": "L4"}, 1).of(Planned("a shape", request, 1, 1.0))
    assert known is not None and known.fits is None and not known.need.whole
    with pytest.raises(ConfigError, match=r"parallel\.gpu"):
        Placement(large, {"gpu": "L4"}, 1).of(Planned("a shape", request, 1, 1.0))


def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are() -> None:
    config = JobConfig(parallel=ParallelConfig(gpu="h100"))
    (mistake,) = [sentence for key, sentence in value_mistakes(config) if key == "parallel.gpu"]
    assert "'h100' is not allowed" in mistake and all(repr(name) in mistake for name in GPUS) and "null" in mistake
    known = JobConfig(parallel=ParallelConfig(gpu="H100"))
    assert not [sentence for key, sentence in value_mistakes(known) if key == "parallel.gpu"]


# ---------------------------------------------------------------- degree: auto


def shape(checkpoint: Bound, size: tuple[int, int, int], items: int = 100, **values: Any) -> Planned:
    request = checkpoint.request(*size, **values)
    tokens, flops = (getattr(checkpoint.spec, name)(request, checkpoint.params) for name in ("tokens", "flops"))
    label = f"{size[1]}x{size[0]}, {size[2]} frames, {request.num_inference_steps} steps"
    return Planned(label, request, tokens, flops, items)


def auto(checkpoint: Bound, shapes: list[Planned], gpus: int | None = None, **parallel: Any) -> Placement:
    return placed(checkpoint, degree="auto", **{"gpu": "H100", **parallel}).settled(shapes, gpus)


SHORT, LONG = (480, 832, 81), (720, 1280, 81)


def test_short_shapes_get_one_gpu_and_long_ones_as_many_as_make_them_within_half_an_hour() -> None:
    """Wan 14B takes 8 minutes of an H100 at 480p, by the figures that the prediction is fitted to, and 55 at 720p."""
    checkpoint = bound("Wan 14B")
    short, long = shape(checkpoint, SHORT), shape(checkpoint, LONG)
    found = auto(checkpoint, [long, short])
    assert (found.parallel["context"], found.parallel["degree"]) == (1, None)
    assert found.parallel["by_shape"] == [{"tokens_above": short.tokens, "context": 2, "cfg": 1}]
    one, two = (placed(checkpoint, gpu="H100", context=n).of(long) for n in (1, 2))
    assert one is not None and two is not None and one.seconds > LONG_SECONDS > two.seconds
    assert found.whys == {
        short.label: "1 GPU: it fits",
        long.label: f"2 GPUs: tokens over 2 (ulysses): {one.seconds / 60:,.0f} minutes an item with 1",
    }
    fit = found.of(long)
    assert fit is not None and (fit.mesh.context, fit.fits, fit.why) == (2, True, found.whys[long.label])


def test_a_shape_that_fits_no_single_gpu_gets_those_that_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, size = bound("HunyuanVideo"), (544, 960, 129)
    needing_two(checkpoint, size, monkeypatch)
    found = auto(checkpoint, [shape(checkpoint, size, num_inference_steps=10)])
    assert found.parallel["context"] == 2 and found.parallel["by_shape"] == []
    assert "it needs the memory of 2" in str(found.whys)


def test_a_degree_that_is_a_number_is_that_context_with_the_split_picked() -> None:
    checkpoint = bound("Wan 1.3B")
    by_degree, by_context = (placed(checkpoint, gpu="H100", **{name: 8}) for name in ("degree", "context"))
    assert by_degree.bands[0].layout == by_context.bands[0].layout == Layout(ring=2, ulysses=4), "12 heads"


def test_few_items_use_the_gpus_that_would_else_be_idle_and_no_more_are_taken_than_there_are() -> None:
    checkpoint = bound("Wan 14B")
    assert auto(checkpoint, [shape(checkpoint, SHORT, items=2)], gpus=8).parallel["context"] == 4
    assert auto(checkpoint, [shape(checkpoint, SHORT, items=5)], gpus=8).parallel["context"] == 1
    assert auto(checkpoint, [shape(checkpoint, LONG, num_inference_steps=400)]).parallel["context"] == LARGEST
    assert auto(checkpoint, [shape(checkpoint, LONG, num_inference_steps=400)], gpus=4).parallel["context"] == 4
    assert auto(checkpoint, [shape(checkpoint, LONG)], gpus=1).parallel["context"] == 1


def test_half_of_the_gpus_of_a_gang_may_predict_the_other_branch() -> None:
    found = auto(bound("Wan 14B"), [shape(bound("Wan 14B"), LONG)], cfg=2)
    assert found.parallel["context"] == 1 and found.bands[0].layout == Layout(cfg=2), "27 minutes, with two"


def test_gangs_of_different_size_that_do_not_fit_beside_each_other_become_one_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three GPUs hold a gang of two and a single one; two hold the gang."""
    checkpoint, size = bound("HunyuanVideo"), (720, 1280, 129)
    needing_two(checkpoint, size, monkeypatch)
    shapes = [shape(checkpoint, size, num_inference_steps=2), shape(checkpoint, (256, 256, 33), num_inference_steps=2)]
    three, two = (auto(checkpoint, shapes, gpus=gpus) for gpus in (3, 2))
    assert three.parallel["context"] == 1 and three.parallel["by_shape"][0]["context"] == 2
    assert two.parallel["context"] == 2 and two.parallel["by_shape"] == []
    assert "2 GPUs have no room" in str(two.whys)
    with pytest.raises(ConfigError, match=r"parallel.degree: auto: 1280x720.* needs 2 of H100 .* there are 1 GPUs"):
        auto(checkpoint, shapes, gpus=1)


def test_a_shape_that_no_degree_can_hold_is_refused_with_the_gpus_that_could() -> None:
    with pytest.raises(ConfigError, match=r"parallel.gpu: 'L4': 1280x720.*allowed: B200, H200"):
        auto(bound("HunyuanVideo"), [shape(bound("HunyuanVideo"), (720, 1280, 129))], gpu="L4")


SIZES = [(256, 256, 33), (480, 832, 33), (480, 832, 81), (720, 1280, 81), (720, 1280, 161)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["Wan 1.3B", "Wan 14B", "HunyuanVideo"]),
    wanted=st.lists(
        st.tuples(st.sampled_from(SIZES), st.sampled_from([1, 50, 400]), st.integers(1, 30)), min_size=1, max_size=6
    ),
    gpu=st.sampled_from(["H100", "H200", "B200"]),
    gpus=st.sampled_from([None, 1, 2, 3, 4, 6, 8, 16, 64]),
    cfg=st.sampled_from([1, 2]),
)
def test_whatever_is_chosen_fits_is_of_powers_of_two_rises_with_the_tokens_and_is_there(
    name: str, wanted: list[tuple[tuple[int, int, int], int, int]], gpu: str, gpus: int | None, cfg: int
) -> None:
    checkpoint = bound(name)
    shapes = [shape(checkpoint, size, items, num_inference_steps=steps) for size, steps, items in wanted]
    try:
        found = auto(checkpoint, shapes, gpus, gpu=gpu, cfg=cfg)
    except ConfigError:
        alone = [auto(checkpoint, [replace(one, items=10**6)], None, gpu=gpu, cfg=cfg).of(one) for one in shapes]
        assert gpus is not None and any(fit is not None and (fit.smallest or 0) * cfg > gpus for fit in alone)
        return
    fits = [found.of(one) for one in sorted(shapes, key=lambda one: one.tokens)]
    assert all(fit is not None and fit.fits and fit.mesh.cfg == cfg and fit.why for fit in fits)
    degrees = [fit.mesh.context for fit in fits if fit is not None]
    assert degrees == sorted(degrees) and set(degrees) <= {1, 2, 4, 8, 16, 32, 64}
    assert gpus is None or sum({band.layout.size for band in found.bands}) <= gpus
    above = [entry["tokens_above"] for entry in found.parallel["by_shape"]]
    assert above == sorted(set(above)), "such as the configuration may say"
    assert auto(checkpoint, shapes[::-1], gpus, gpu=gpu, cfg=cfg).parallel == found.parallel, "in whatever order"


def test_auto_needs_a_gpu_and_leaves_nothing_else_to_say() -> None:
    def mistakes(**parallel: Any) -> list[str]:
        found = value_mistakes(JobConfig(parallel=ParallelConfig(**parallel)))
        return [sentence for key, sentence in found if key.startswith("parallel")]

    (without,) = mistakes(degree="auto")
    assert "parallel.gpu" in without and "H100" in without
    assert mistakes(degree="auto", gpu="H100") == mistakes(degree="auto", gpu="H100", cfg=2) == []
    for said in ({"context": 2}, {"ring": 2}, {"by_shape": [{"tokens_above": 1, "context": 2}]}, {"replicas": 3}):
        (sentence,) = mistakes(degree="auto", gpu="H100", **said)
        assert f"parallel.{next(iter(said))}" in sentence
    assert mistakes(degree=4) == []
    (both,) = mistakes(degree=4, context=4)
    assert both.startswith("parallel.degree: 4 beside parallel.context (4)")
    (odd,) = mistakes(degree="many")
    assert "'many'" in odd
    diffusers = JobConfig(parallel=ParallelConfig(degree="auto", gpu="H100"))
    diffusers.model.family = "diffusers"
    assert any("parallel.degree: auto is not available" in sentence for _, sentence in value_mistakes(diffusers))


def test_auto_is_refused_for_a_model_whose_memory_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.degree: auto needs a model whose memory is known"):
        Placement(Sizing({"unet": memory.Component(10, 20)}, None, {}), {"degree": "auto", "gpu": "H100"}, 1)
