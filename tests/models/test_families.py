"""The family contract, over every native family there is: a new one is tested by being there."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.case import Case, cases, native_families
from vidgen import engine, family, parity
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.engine import Engine
from vidgen.errors import CheckpointError, ConfigError
from vidgen.loop import Loop
from vidgen.types import Hooks, Media, ModelSettings, Request

CASES = cases()
FIRST = {name.partition("/")[0]: name for name in reversed(CASES)}
"""One case a family."""
BATCHED = 2e-4
"""A batch of two against two single runs, of full scale: kernels for another size sum in another order, and a few
guided steps multiply it."""

Checkpoint = Callable[[str], Path]
Asked = Callable[..., Request]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name.replace("/", "-"))
            CASES[name].write(made[name])
        return made[name]

    return once


@pytest.fixture(scope="module")
def loaded(checkpoint: Checkpoint) -> Callable[[str], Engine]:
    made: dict[str, Engine] = {}

    def once(name: str) -> Engine:
        if name not in made:
            made[name] = engine.load(str(checkpoint(name)), task=CASES[name].task)
        return made[name]

    return once


@pytest.fixture(scope="module")
def asked(loaded: Callable[[str], Engine], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A request for a case, with conditioning media of its size where the task wants them."""

    def make(name: str, **changes: Any) -> Request:
        model, case = loaded(name), CASES[name]
        defaults = model.spec.defaults(case.task, model.params)
        values = {**case.sampling, **changes}
        size = [values.get(key) or defaults[key] for key in ("num_frames", "height", "width")]
        takes = [field for field, required in model.spec.TASKS[case.task].items() if required or field in case.media]
        media = conditioning_media(takes, size, tmp_path_factory.mktemp("media"))
        return model.request(values.pop("prompt", "a red circle moving left"), **media | {"seed": 7} | values)

    return make


def conditioning_media(takes: Sequence[str], size: list[int], folder: Path) -> dict[str, Any]:
    """A picture for each image, and a clip of as many frames as are asked for."""
    draw = np.random.default_rng(0)
    frames, height, width = size
    found = {}
    for name in takes:
        if name == "video":
            place = folder / "video.zip"
            with zipfile.ZipFile(place, "w") as archive:
                for index in range(frames):
                    with archive.open(f"{index:05d}.png", "w") as file:
                        Image.fromarray(picture(draw, height, width)).save(file, "PNG")
        else:
            place = folder / f"{name}.png"
            Image.fromarray(picture(draw, height, width)).save(place)
        found[name] = place
    return found


def picture(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours: noise would be the same everywhere to an encoder."""
    small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def pipeline_of(model: Engine) -> Any:
    assert isinstance(model.backend, Loop)
    return model.backend.pipeline


def frames(model: Engine, *requests: Request, batch: int | None = None) -> list[np.ndarray]:
    return [np.concatenate(list(video.chunks)) for video in model.generate(requests, batch=batch)]


@pytest.mark.parametrize("name", CASES)
def test_every_stage_agrees_with_diffusers(name: str, checkpoint: Checkpoint, asked: Asked) -> None:
    request = asked(name)
    report = parity.compare(*comparison(checkpoint(name), CASES[name], request))
    assert report.ok, "\n".join(map(str, [*report.stages, report.psnr]))
    assert len([stage for stage in report.stages if stage.name.startswith("step")]) >= 2


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_tiled_decoding_agrees_with_diffusers_at_the_same_tiles(
    name: str, checkpoint: Checkpoint, asked: Asked, loaded: Callable[[str], Engine], record_property: Any
) -> None:
    request = tiled(loaded(name), asked(name))
    report = parity.compare(*comparison(checkpoint(name), CASES[name], request))
    assert report.ok, "\n".join(map(str, [*report.stages, report.psnr]))
    whole, parts = frames(loaded(name), replace(request, tiling=None)), frames(loaded(name), request)
    distance = float(np.abs(whole[0].astype(float) - parts[0]).mean() / 255)
    record_property("mean distance of tiled to whole", distance)
    print(f"{name}: tiled {request.tiling} is {distance:.4f} of full scale from whole, on average")


def tiled(model: Engine, request: Request) -> Request:
    """The request with tiles smaller than its picture, if the family has a choice."""
    if request.tiling is not None:
        return request
    for step in (8, 16, 32):
        tile = (request.height - step, request.width - step)
        candidate = replace(request, tiling=(*tile, tile[0] - step, tile[1] - step))
        if min(tile) > step and not model.spec.problems(candidate, model.params, {}):
            return candidate
    raise AssertionError(f"no tiles fit {request.height} x {request.width}")


def comparison(folder: Path, case: Case, request: Request) -> tuple[ModelSettings, dict[str, Any], str | None]:
    fields = ("prompt", "negative_prompt", "seed", "height", "width", "num_frames", "fps", "num_inference_steps")
    fields = (*fields, "guidance_scale", "sampler", "shift", "sigmas", "timesteps", "tiling")
    values = {field: getattr(request, field) for field in (*fields, "image", "last_image", "video")}
    values["params"] = dict(request.params)
    return ModelSettings(checkpoint=str(folder), task=case.task), values, case.pipeline


@pytest.mark.parametrize("name", CASES)
def test_flops_are_what_torch_counts(name: str, loaded: Callable[[str], Engine], asked: Asked) -> None:
    model, request = loaded(name), asked(name)
    pipeline, counted = pipeline_of(model), []
    predict = pipeline.predict

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = predict(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return result

    pipeline.predict = counting
    try:
        frames(model, request)
    finally:
        del pipeline.predict
    assert model.spec.flops(request, model.params) == pytest.approx(sum(counted), rel=0.01)
    assert model.spec.tokens(request, model.params) > 0


@pytest.mark.parametrize("name", CASES)
def test_weight_bytes_are_those_of_the_files(
    name: str, checkpoint: Checkpoint, loaded: Callable[[str], Engine]
) -> None:
    folder = open_checkpoint(str(checkpoint(name)))
    stored = 0
    for component in folder.components:
        for path in folder.weights(component):
            with safe_open(str(checkpoint(name) / path), framework="pt") as file:
                stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    model = loaded(name)
    assert model.spec.weight_bytes(model.params) == pytest.approx(stored, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_equal_requests_give_equal_bytes_and_another_seed_others(
    name: str, loaded: Callable[[str], Engine], asked: Asked
) -> None:
    model = loaded(name)
    first, again, other = (frames(model, asked(name, seed=seed))[0] for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    request = asked(name)
    assert first.shape == (model.spec.frames_out(request), request.height, request.width, 3)
    assert first.std() > 1, "a flat clip shows nothing"


@pytest.mark.parametrize("name", CASES)
def test_two_prompts_of_one_shape_share_forwards_and_come_out_as_alone(
    name: str, loaded: Callable[[str], Engine], asked: Asked
) -> None:
    model = loaded(name)
    requests = [asked(name, seed=3), asked(name, seed=4, prompt="the green square and the cat or a dog")]
    assert len({model.spec.batch_key(request, model.params) for request in requests}) == 1
    videos = [(np.concatenate(list(video.chunks)), video) for video in model.generate(requests)]
    for request, (together, video) in zip(requests, videos, strict=True):
        assert video.batch == 2
        alone = frames(model, request)[0]
        assert np.abs(together.astype(float) - alone).max() <= max(1, 255 * BATCHED), "a level of rounding at most"
        assert video.counts["conditional_forwards"] == pipeline_of(model).schedule(request).steps


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_loading_is_strict(name: str, component: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint(name), tmp_path / "copy")
    (place,) = (copy / component).glob("*.safetensors")
    tensors = load_file(place)
    key = sorted(tensors)[0]
    held = tensors.pop(key)
    save_file(tensors, place)
    with pytest.raises(CheckpointError, match="missing") as missing:
        engine.load(str(copy), task=CASES[name].task)
    assert key in str(missing.value)
    save_file({**tensors, key: held, "surplus.weight": held.clone()}, place)
    with pytest.raises(CheckpointError, match=r"surplus\.weight"):
        engine.load(str(copy), task=CASES[name].task)


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_an_option_that_nobody_knows_is_named(
    name: str, component: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint(name), tmp_path / "copy")
    place = copy / component / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "fancy_new_mode": True}))
    with pytest.raises(CheckpointError, match="fancy_new_mode"):
        engine.load(str(copy), task=CASES[name].task)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 17),
        ("width", 0),
        ("num_frames", 0),
        ("num_inference_steps", 0),
        ("guidance_scale", 0.5),
        ("guidance_scale", math.inf),
        ("fps", -1.0),
        ("seed", 2**48),
        ("sampler", "magic"),
        ("shift", -2.0),
        ("task", "x2v"),
        ("params", (("magic", 1),)),
        ("sigmas", (0.5, 0.9)),
    ],
)
def test_each_limit_is_refused_with_field_value_and_what_is_allowed(
    name: str, field: str, value: Any, loaded: Callable[[str], Engine], asked: Asked
) -> None:
    model, request = loaded(name), asked(name)
    assert model.spec.problems(request, model.params, {}) == []
    problems = model.spec.problems(replace(request, **{field: value}), model.params, {})
    shown = "magic" if field == "params" else field
    assert any(shown in problem for problem in problems), problems


@pytest.mark.parametrize("name", CASES)
def test_media_are_wanted_or_refused_as_the_task_says(name: str, loaded: Callable[[str], Engine], asked: Asked) -> None:
    model, request = loaded(name), asked(name)
    takes = model.spec.TASKS[CASES[name].task]
    for field in ("image", "last_image", "video"):
        if takes.get(field):
            problems = model.spec.problems(replace(request, **{field: None}), model.params, {})
            assert any(field in problem for problem in problems), problems
        if field not in takes:
            given = replace(request, **{field: Media(__file__, "")})
            assert any(field in problem for problem in model.spec.problems(given, model.params, {}))


@pytest.mark.parametrize("name", CASES)
def test_a_task_that_the_checkpoint_cannot_do_is_refused_at_once(name: str, checkpoint: Checkpoint) -> None:
    with pytest.raises((ConfigError, CheckpointError), match="x2v"):
        engine.load(str(checkpoint(name)), task="x2v")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.causal])
def test_no_frame_depends_on_a_later_one(name: str, loaded: Callable[[str], Engine], asked: Asked) -> None:
    model, request = loaded(name), asked(name)
    vae = pipeline_of(model).vae
    draw = torch.Generator().manual_seed(0)
    video = torch.randn(1, 3, request.num_frames, request.height, request.width, generator=draw).clamp(-1, 1)
    with torch.inference_mode():
        latents = vae.encode(video, request.tiling)[0]
        video[:, :, -1] = -video[:, :, -1]
        changed = vae.encode(video, request.tiling)[0]
        assert latents.shape[2] >= 2, "one latent frame has no order"
        assert torch.equal(latents[:, :, 0], changed[:, :, 0])
        assert not torch.equal(latents[:, :, -1], changed[:, :, -1])
        before = torch.cat(list(vae.decode_chunks(latents, request.tiling)), dim=2)
        latents[:, :, -1] += 1
        after = torch.cat(list(vae.decode_chunks(latents, request.tiling)), dim=2)
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_encoding_and_decoding_keep_the_shape(name: str, loaded: Callable[[str], Engine], asked: Asked) -> None:
    request = asked(name)
    vae = pipeline_of(loaded(name)).vae
    draw = torch.Generator().manual_seed(0)
    video = torch.randn(1, 3, request.num_frames, request.height, request.width, generator=draw).clamp(-1, 1)
    with torch.inference_mode():
        mean, logvar = vae.encode(video, request.tiling)
        assert mean.shape == logvar.shape
        again = torch.cat(list(vae.decode_chunks(mean, request.tiling)), dim=2)
    assert again.shape == video.shape
    assert bool(torch.isfinite(again).all())


@pytest.mark.parametrize("name", native_families())
def test_a_family_is_recognised_by_each_of_its_pipelines(name: str) -> None:
    spec = family.spec(name)
    for pipeline, tasks in spec.PIPELINES.items():
        assert family.recognise({"_class_name": pipeline}) == name
        assert tasks
    assert {task for tasks in spec.PIPELINES.values() for task in tasks} == set(spec.TASKS), "each has its reference"


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_a_distilled_schedule_has_its_own_levels_and_one_forward_a_step(
    name: str, checkpoint: Checkpoint, loaded: Callable[[str], Engine], asked: Asked
) -> None:
    """Explicit sigmas, timesteps, or both, whichever the family takes; against diffusers where its call takes them."""
    model, taken = loaded(name), []
    index = open_checkpoint(str(checkpoint(name))).configs()["model_index"]
    reference = CASES[name].pipeline or parity.reference.pipeline_of(
        model.family, CASES[name].task, index["_class_name"]
    )
    scheduler = getattr(diffusers, index["scheduler"][1])
    call = set(signature(getattr(diffusers, reference).__call__).parameters) & set(
        signature(scheduler.set_timesteps).parameters
    )
    for field, values in (("sigmas", (1.0, 0.7, 0.3)), ("timesteps", (990.0, 700.0, 300.0))):
        try:
            request = asked(name, num_inference_steps=3, guidance_scale=1.0, **{field: values})
        except ValueError as error:
            assert field in str(error)
            continue
        taken.append(field)
        (video,) = model.generate([request])
        assert np.concatenate(list(video.chunks)).std() > 0
        forwards = {key: count for key, count in video.counts.items() if key.endswith("_forwards")}
        assert forwards == {"conditional_forwards": 3}
        if field in call:
            report = parity.compare(*comparison(checkpoint(name), CASES[name], request))
            assert report.ok, "\n".join(map(str, report.stages))
    assert taken


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_goes_on_to_the_same_bytes(name: str, loaded: Callable[[str], Engine], asked: Asked) -> None:
    model, request = loaded(name), asked(name)
    states: list[bytes] = []
    (whole,) = list(_frames(model, request, Hooks(save=lambda state: states.append(state.to_bytes()))))
    from vidgen.loop import State

    (resumed,) = list(_frames(model, request, Hooks(resume=lambda requests: State.from_bytes(states[0]))))
    assert np.array_equal(whole, resumed)


def _frames(model: Engine, request: Request, hooks: Hooks) -> Iterator[np.ndarray]:
    for video in model.generate([request], hooks):
        yield np.concatenate(list(video.chunks))


@pytest.mark.parametrize("name", CASES)
def test_sparing_memory_changes_no_bit_and_keeps_one_component_at_a_time(
    name: str, asked: Asked, loaded: Callable[[str], Engine]
) -> None:
    model, made = loaded(name), asked(name)
    loop = model.backend
    assert isinstance(loop, Loop) and len(loop.residency.components) >= 3
    (usual,) = frames(model, made)
    present: list[list[str]] = []

    def stepped(stage: str, step: int, steps: int) -> None:
        if stage != "encode":
            there = [n for n, m in loop.residency.components.items() if any(p.numel() for p in m.parameters())]
            present.append(there)

    hooks = Hooks(progress=stepped, rungs=("alone", "caches", "offload"))
    (sparing,) = (np.concatenate(list(video.chunks)) for video in model.generate([made], hooks))
    assert np.array_equal(usual, sparing)
    assert all(len(there) == 1 for there in present) and len({there[0] for there in present}) >= 2
    assert np.array_equal(usual, frames(model, made)[0]), "and afterwards all is as before"
    assert all(p.numel() for module in loop.residency.components.values() for p in module.parameters())


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_a_model_loaded_for_offload_makes_the_same_frames(
    name: str, checkpoint: Checkpoint, asked: Asked, loaded: Callable[[str], Engine]
) -> None:
    sparing = engine.load(str(checkpoint(name)), task=CASES[name].task, offload="model")
    assert isinstance(sparing.backend, Loop) and sparing.backend.residency.sparing
    assert np.array_equal(frames(loaded(name), asked(name))[0], frames(sparing, asked(name))[0])
