"""Native against diffusers on one checkpoint and one request, stage by stage: text, each step, encode, decode, frames.

Ours runs first and is freed but for its VAE, so that a GPU holds one of the two at a time; both start from one seed.
The only file outside `vidgen/models/diffusers/` that imports diffusers. Refuses to know any family: it looks at what
`vidgen.loop.Pipeline` promises, and at the arguments that the reference's call has.
"""

from __future__ import annotations

import gc
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vidgen import engine, family
from vidgen.checkpoint.fetch import fetched
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.conditioning import read as read_media
from vidgen.errors import ConfigError
from vidgen.loop import Loop, State
from vidgen.parallel import ALONE, Ranks
from vidgen.sampling.step import Draws, Start
from vidgen.types import Hooks, ModelSettings, Request

PROMPT = "a red circle moving left"
STEPS = 4
"""Steps of a comparison by default: each is compared, and more only repeat what they show."""
EXACT, WHOLE = 1e-4, 1e-3
"""fp32: largest error of one stage (text, encode, decode, the first step), and of what stages have added up to, in
shares of the reference's largest value. Sums in another order are all the difference there may be."""
ROUNDED, ROUNDED_WHOLE = 0.03, 0.15
"""bf16 and fp16: the same as root mean squares, since single values may round a step apart (2^-8) many times over."""
PSNR, ROUNDED_PSNR = 60.0, 25.0
"""Least peak signal-to-noise ratio of the frames, in dB: 60 is WHOLE of full scale."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One comparison: `largest` and `rms` error in shares of the reference's largest and rms value, and whether the one
    that counts for the dtype is within `limit`."""

    name: str
    shape: tuple[int, ...]
    largest: float
    rms: float
    limit: float
    ok: bool


@dataclass(slots=True)
class Report:
    """What was compared, and how long and how much memory each side took. Bytes: the GPU's peak, or on a CPU the
    process's. `defaults` are the family's own parameters where nobody says otherwise."""

    checkpoint: str
    family: str
    task: str
    pipeline: str
    dtype: str
    device: str
    request: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    psnr: float = 0.0
    least_psnr: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages) and self.psnr >= self.least_psnr


@dataclass(slots=True)
class _Trace:
    """What one side did: embeddings as the transformer got them, latents after each step, frames [F, H, W, 3]; of ours
    also where it began, its decoder, and the generator's state as decoding began."""

    texts: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    frames: Tensor | None = None
    moments: tuple[Tensor, Tensor] | None = None
    step_times: list[float] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    decode: Callable[[Tensor, Request, Draws, Ranks], Iterator[Tensor]] | None = None
    drawn: Tensor | None = None


def compare(settings: ModelSettings, sampling: Mapping[str, Any] | None = None, pipeline: str | None = None) -> Report:
    """Compares both on `sampling` (fields of a request over the family's defaults; 4 steps if it does not say).

    `pipeline` is the reference's class, by default the family's for the task. ConfigError without diffusers, or for a
    family that is not native.
    """
    diffusers = _diffusers()
    index = open_checkpoint(settings.checkpoint, settings.revision).configs()["model_index"]
    name = family.recognise(index) if settings.family == "auto" else settings.family
    if not _is_native(name):
        raise ConfigError(f"parity: {name} is not a native family; there is nothing to compare")
    settings = replace(settings, family=name)
    chosen = pipeline or reference_of(name, settings.task, str(index.get("_class_name")))
    loaded = engine.load_model(settings)
    assert isinstance(loaded.backend, Loop)
    native, own = loaded.backend.pipeline, dict(sampling or {})
    own.setdefault("num_inference_steps", len(own.get("sigmas") or own.get("timesteps") or range(STEPS)))
    request = loaded.request(str(own.pop("prompt", PROMPT)), **own)
    device, dtypes = native.device, native.dtypes
    report = Report(
        checkpoint=loaded.checkpoint,
        family=name,
        task=settings.task,
        pipeline=chosen,
        dtype=", ".join(f"{component} {str(dtype)[6:]}" for component, dtype in dtypes.items()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        request={key: value for key, value in asdict(request).items() if key not in ("image", "last_image", "video")},
        defaults=dict(loaded.spec.defaults(settings.task, loaded.params).get("params") or {}),
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
    )
    with _measured(report, "native", device):
        ours = _native(loaded.backend, request, report)
        _keep_the_vae(native)
    with _measured(report, "diffusers", device):
        folder = open_checkpoint(settings.checkpoint, settings.revision)
        local = fetched(folder, Path(settings.cache_dir or "~/.cache/vidgen").expanduser()).local
        theirs = _reference(getattr(diffusers, chosen), str(local), request, dtypes, device, report)
    _compare(report, native, request, ours, theirs)
    return report


def show(report: Report, console: Console) -> None:
    """The stages as a table, then frames, memory and seconds."""
    table = Table("stage", "shape", "largest error", "rms error", "limit", "")
    for stage in report.stages:
        shape = " x ".join(map(str, stage.shape))
        verdict = "ok" if stage.ok else "[red]too far[/red]"
        table.add_row(stage.name, shape, f"{stage.largest:.2e}", f"{stage.rms:.2e}", f"{stage.limit:g}", verdict)
    console.print(
        f"{report.checkpoint}: {report.family} {report.task} against {report.pipeline}", markup=False, highlight=False
    )
    console.print(f"  {report.dtype} on {report.device}", highlight=False)
    console.print(table)
    verdict = "ok" if report.psnr >= report.least_psnr else "too far"
    console.print(f"frames: PSNR {report.psnr:.1f} dB, at least {report.least_psnr:g}: {verdict}", highlight=False)
    times = Table("", "native", "diffusers")
    for row in ("total", "a step"):
        times.add_row(
            f"seconds, {row}", *(f"{report.seconds[f'{side} {row}']:.3f}" for side in ("native", "diffusers"))
        )
    times.add_row("peak memory, GB", *(f"{report.bytes[side] / 1e9:.2f}" for side in ("native", "diffusers")))
    console.print(times)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("parity needs diffusers to compare with: pip install 'vidgen[diffusers]'") from error
    return diffusers


def _is_native(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(f"vidgen.models.{name}.pipeline") is not None


def reference_of(name: str, task: str, published: str) -> str:
    """The reference's pipeline for a task: the checkpoint's own if it does that, else the family's first that does."""
    classes = family.spec(name).PIPELINES
    if task in classes.get(published, ()):
        return published
    for pipeline, does in classes.items():
        if task in does:
            return pipeline
    raise ConfigError(f"parity: diffusers has no pipeline for {task} of {name}")


# ---------------------------------------------------------------- the reference


def _reference(
    cls: Any, folder: str, request: Request, dtypes: Mapping[str, torch.dtype], device: torch.device, report: Report
) -> _Trace:
    """Runs the reference's pipeline and records what it does."""
    trace = _Trace()
    pipe = cls.from_pretrained(folder, torch_dtype={**dtypes, "default": torch.float32}, use_safetensors=True)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    _tile(pipe.vae, request)

    def text_seen(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not trace.latents:
            states = kwargs["encoder_hidden_states"]
            trace.texts += [*states.detach().float().cpu().reshape(-1, *states.shape[-2:])]

    def step_done(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        trace.latents.append(values["latents"].detach().float().cpu())
        trace.step_times.append(_now(device))
        return values

    handle = pipe.transformer.register_forward_pre_hook(text_seen, with_kwargs=True)
    arguments = call_arguments(inspect.signature(pipe.__call__).parameters, request, report.defaults)
    with torch.no_grad(), _global_numbers_from(pipe.vae, arguments["generator"]):
        begun = _now(device)
        result = pipe(**arguments, callback_on_step_end=step_done, output_type="np")
        report.seconds["diffusers total"] = _now(device) - begun
    handle.remove()
    report.seconds["diffusers a step"] = _a_step(trace.step_times)
    trace.frames = torch.from_numpy(np.asarray(result.frames[0], dtype=np.float32))
    with torch.no_grad():
        posterior = pipe.vae.encode(_clip(trace.frames, dtypes["vae"], device)).latent_dist
    trace.moments = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
    return trace


def call_arguments(parameters: Mapping[str, Any], request: Request, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a diffusers pipeline's call that mean what the request says. Standard ones that it does not have
    are left out, and so are the family's own where the request has the default."""
    media = read_media(request)
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "frame_rate": request.fps,
        "sigmas": list(request.sigmas) if request.sigmas else None,
        "timesteps": list(request.timesteps) if request.timesteps else None,
        "image": None if media.image is None else Image.fromarray(media.image),
        "last_image": None if media.last_image is None else Image.fromarray(media.last_image),
        "video": None if media.video is None else [Image.fromarray(frame) for frame in media.video],
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        **dict(request.params),
    }
    unknown = [name for name, value in request.params if name not in parameters and value != defaults.get(name)]
    if unknown:
        raise ConfigError(f"parity: params.{unknown[0]} is not an argument of the reference's call")
    return {name: value for name, value in values.items() if name in parameters and value is not None}


@contextmanager
def _global_numbers_from(vae: Any, generator: torch.Generator) -> Iterator[None]:
    """A decoder that injects noise draws it from the process's generator, which no seed of a call reaches: here it goes
    on where the call's own generator stands, as ours does."""
    decode = vae.decode

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.set_rng_state(generator.get_state())
        return decode(*args, **kwargs)

    vae.decode = seeded
    with torch.random.fork_rng():
        yield
    vae.decode = decode


def _tile(vae: Any, request: Request) -> None:
    """Switches the reference's VAE to the request's tiles, in the words that it has for them."""
    if request.tiling is None:
        if hasattr(vae, "disable_tiling"):
            vae.disable_tiling()
        return
    height, width, down, right = request.tiling
    words = {
        "tile_sample_min_height": height,
        "tile_sample_min_width": width,
        "tile_sample_stride_height": down,
        "tile_sample_stride_width": right,
        "tile_overlap_factor_height": Fraction(height - down, height),  # diffusers truncates what it makes of it
        "tile_overlap_factor_width": Fraction(width - right, width),
    }
    known = inspect.signature(vae.enable_tiling).parameters
    vae.enable_tiling(**{name: value for name, value in words.items() if name in known})


# ---------------------------------------------------------------- the native side


def _native(loop: Loop, request: Request, report: Report) -> _Trace:
    """Runs ours and records what it does."""
    pipeline, trace = loop.pipeline, _Trace()
    begin, decode, encode_text = pipeline.begin, pipeline.decode, pipeline.encode_text
    frames: list[Tensor] = []
    trace.decode = decode

    def beginning(*args: Any) -> Start:
        trace.starts.append(begin(*args))
        return trace.starts[0]

    def decoding(latents: Tensor, request: Request, draws: Draws, ranks: Ranks) -> Iterator[Tensor]:
        trace.drawn = draws.state()
        for chunk in decode(latents, request, draws, ranks):
            frames.append(chunk.detach().float().cpu())
            yield chunk

    def encoding(prompts: Sequence[Any]) -> list[Any]:
        texts = encode_text(prompts)
        trace.texts += [text.embedding[: text.tokens].detach().float().cpu() for text in texts]
        return texts

    def stepped(state: State) -> None:
        trace.latents.append(state.latents.detach().float().cpu())
        trace.step_times.append(_now(pipeline.device))

    for name, recording in (("begin", beginning), ("decode", decoding), ("encode_text", encoding)):
        setattr(pipeline, name, recording)
    begun = _now(pipeline.device)
    for video in loop.generate([request], Hooks(save=stepped)):
        for _ in video.chunks:
            pass
        report.seconds |= {f"native {stage}": seconds for stage, seconds in video.seconds.items()}
    report.seconds["native total"] = _now(pipeline.device) - begun
    report.seconds["native a step"] = _a_step(trace.step_times)
    trace.frames = torch.cat(frames)
    return trace


def _keep_the_vae(pipeline: Any) -> None:
    """Lets go of every other network, and of what they made for the next batch."""
    for name in [name for name in vars(pipeline) if name not in ("vae", "params", "device", "dtypes")]:
        if name not in ("begin", "decode", "encode_text"):
            setattr(pipeline, name, None)


def _compare(report: Report, pipeline: Any, request: Request, ours: _Trace, theirs: _Trace) -> None:
    """Fills in the stages. Ours encodes the reference's frames, and decodes the reference's last latents."""
    assert ours.frames is not None and theirs.frames is not None and theirs.moments is not None
    exact = set(pipeline.dtypes.values()) == {torch.float32}
    stage, whole = (EXACT, WHOLE) if exact else (ROUNDED, ROUNDED_WHOLE)

    def add(name: str, mine: Tensor, other: Tensor, limit: float) -> None:
        report.stages.append(_stage(name, mine, other, limit, exact))

    for number, text in enumerate(ours.texts):
        if len(text):  # an empty prompt may have no token of its own
            add("text" if number == 0 else "text, negative", text, _nearest(text, theirs.texts), stage)
    start = ours.starts[0]
    for i, (mine, other) in enumerate(zip(ours.latents, theirs.latents, strict=True)):
        if start.pin is not None:  # what is pinned is never denoised, and the two leave different things there
            free = ~start.pin[0].cpu().expand_as(mine)
            mine, other = mine[free], other[free]
        add(f"step {i + 1}", mine, other, stage if i == 0 else whole)
    with torch.inference_mode():
        clip = _clip(theirs.frames, pipeline.dtypes["vae"], pipeline.device)
        mean, logvar = (part.float().cpu() for part in pipeline.vae.encode(clip, request.tiling))
    add("VAE encode, mean", mean, theirs.moments[0], stage)
    add("VAE encode, log variance", logvar, theirs.moments[1], stage)
    add(
        "VAE decode",
        _decoded(ours, start.pinned(theirs.latents[-1].to(pipeline.device)), request),
        theirs.frames,
        stage,
    )
    add("frames", ours.frames, theirs.frames, whole)
    if ours.frames.shape == theirs.frames.shape:
        error = float((ours.frames - theirs.frames).double().square().mean())
        report.psnr = math.inf if error == 0 else -10 * math.log10(error)
    report.least_psnr = PSNR if exact else ROUNDED_PSNR


def _decoded(ours: _Trace, latents: Tensor, request: Request) -> Tensor:
    """Frames of these latents, with the random numbers that the first decoding had."""
    assert ours.decode is not None and ours.drawn is not None
    draws = Draws([request.seed])
    draws.restore(ours.drawn)
    with torch.inference_mode():
        return torch.cat([chunk.float().cpu() for chunk in ours.decode(latents, request, draws, ALONE)])


def _stage(name: str, ours: Tensor, theirs: Tensor, limit: float, exact: bool) -> Stage:
    """Errors in shares of the reference's own size; what has another shape has no error that could be stated."""
    if ours.shape != theirs.shape:
        return Stage(f"{name}: {list(ours.shape)} against {list(theirs.shape)}", (), math.inf, math.inf, limit, False)
    difference = (ours - theirs).double()
    largest = float(difference.abs().max() / theirs.abs().max().clamp_min(1e-12))
    rms = float(difference.square().mean().sqrt() / theirs.double().square().mean().sqrt().clamp_min(1e-12))
    return Stage(name, tuple(ours.shape), largest, rms, limit, (largest if exact else rms) <= limit)


def _nearest(text: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The row of the reference's batch that is this prompt's: guided pipelines stack their branches in some order."""
    cut = [row[: len(text)] for row in rows]
    return min(cut, key=lambda row: float((row - text).abs().max()) if row.shape == text.shape else math.inf)


def _clip(frames: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[F, H, W, 3] in [0, 1] -> [1, 3, F, H, W] in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2)[None] * 2 - 1).to(device, dtype)


# ---------------------------------------------------------------- time and memory


@contextmanager
def _measured(report: Report, side: str, device: torch.device) -> Iterator[None]:
    """Peak memory of what happens inside, and nothing left of it afterwards."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        page = 4096
        while not done.wait(0.05):
            peak[0] = max(peak[0], int(Path("/proc/self/statm").read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/statm").exists():
        watcher.start()
    yield
    done.set()
    report.bytes[side] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak[0]
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _a_step(times: Sequence[float]) -> float:
    """Seconds a step, the first left out: it holds what is done once."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else math.nan
