"""Native against diffusers on one checkpoint and one request, stage by stage: text, each step, encode, decode, frames.

    reference    what diffusers does        native    what we do        trace    what is recorded of either
    report       the stages, and how they are shown

Ours runs first and is freed but for its VAE, so that a GPU holds one of the two at a time; both start from one seed.
The only room outside `vidgen/models/diffusers/` that imports diffusers. Refuses to know any family: it looks at what
`vidgen.loop.Pipeline` promises, and at the arguments that the reference's call has.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import engine, family
from vidgen.checkpoint.fetch import fetched
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import ConfigError
from vidgen.loop import Loop
from vidgen.parity import native, reference
from vidgen.parity.report import Report, Stage
from vidgen.parity.trace import Trace, clip_of, measured
from vidgen.types import ModelSettings, Request

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


def compare(settings: ModelSettings, sampling: Mapping[str, Any] | None = None, pipeline: str | None = None) -> Report:
    """Compares both on `sampling` (fields of a request over the family's defaults; 4 steps if it does not say).

    `pipeline` is the reference's class, by default the family's for the task. ConfigError without diffusers, or for a
    family that is not native.
    """
    diffusers = reference.library()
    index = open_checkpoint(settings.checkpoint, settings.revision).configs()["model_index"]
    name = family.recognise(index) if settings.family == "auto" else settings.family
    if not _is_native(name):
        raise ConfigError(f"parity: {name} is not a native family; there is nothing to compare")
    settings = replace(settings, family=name)
    chosen = pipeline or reference.pipeline_of(name, settings.task, str(index.get("_class_name")))
    loaded = engine.load_model(settings)
    assert isinstance(loaded.backend, Loop)
    built, own = loaded.backend.pipeline, dict(sampling or {})
    own.setdefault("num_inference_steps", len(own.get("sigmas") or own.get("timesteps") or range(STEPS)))
    request = loaded.request(str(own.pop("prompt", PROMPT)), **own)
    device, dtypes = built.device, built.dtypes
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
    with measured(report, "native", device):
        ours = native.run(loaded.backend, request, report)
        native.keep_the_vae(built)
    with measured(report, "diffusers", device):
        folder = open_checkpoint(settings.checkpoint, settings.revision)
        local = fetched(folder, Path(settings.cache_dir or "~/.cache/vidgen").expanduser()).local
        theirs = reference.run(getattr(diffusers, chosen), str(local), request, dtypes, device, report)
    _compare(report, built, request, ours, theirs)
    return report


def _compare(report: Report, pipeline: Any, request: Request, ours: Trace, theirs: Trace) -> None:
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
        clip = clip_of(theirs.frames, pipeline.dtypes["vae"], pipeline.device)
        mean, logvar = (part.float().cpu() for part in pipeline.vae.encode(clip, request.tiling))
    add("VAE encode, mean", mean, theirs.moments[0], stage)
    add("VAE encode, log variance", logvar, theirs.moments[1], stage)
    last = start.pinned(theirs.latents[-1].to(pipeline.device))
    add("VAE decode", native.decoded(ours, last, request), theirs.frames, stage)
    add("frames", ours.frames, theirs.frames, whole)
    if ours.frames.shape == theirs.frames.shape:
        error = float((ours.frames - theirs.frames).double().square().mean())
        report.psnr = math.inf if error == 0 else -10 * math.log10(error)
    report.least_psnr = PSNR if exact else ROUNDED_PSNR


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


def _is_native(name: str) -> bool:
    return importlib.util.find_spec(f"vidgen.models.{name}.pipeline") is not None
