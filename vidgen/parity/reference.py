"""The reference's side: a pipeline of diffusers, called with what the request says, and watched."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidgen import family
from vidgen.conditioning import read as read_media
from vidgen.errors import ConfigError
from vidgen.parity.report import Report
from vidgen.parity.trace import Trace, a_step, clip_of, now
from vidgen.text.configs import no_questions
from vidgen.types import Request


def library() -> Any:
    """The module `diffusers`; ConfigError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("parity needs diffusers to compare with: pip install 'vidgen[diffusers]'") from error
    return diffusers


def pipeline_of(name: str, task: str, published: str) -> str:
    """The reference's pipeline for a task: the checkpoint's own if it does that, else the family's first that does.
    ConfigError if none does."""
    classes = family.spec(name).PIPELINES
    if task in classes.get(published, ()):
        return published
    for pipeline, does in classes.items():
        if task in does:
            return pipeline
    raise ConfigError(f"parity: diffusers has no pipeline for {task} of {name}")


def run(
    cls: Any, folder: str, request: Request, dtypes: Mapping[str, torch.dtype], device: torch.device, report: Report
) -> Trace:
    """Runs the reference's pipeline and records what it does."""
    trace = Trace()
    with no_questions():
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
        trace.step_times.append(now(device))
        return values

    handle = pipe.transformer.register_forward_pre_hook(text_seen, with_kwargs=True)
    arguments = _arguments(inspect.signature(pipe.__call__).parameters, request, report.defaults)
    with torch.no_grad(), _global_numbers_from(pipe.vae, arguments["generator"]):
        begun = now(device)
        result = pipe(**arguments, callback_on_step_end=step_done, output_type="np")
        report.seconds["diffusers total"] = now(device) - begun
    handle.remove()
    report.seconds["diffusers a step"] = a_step(trace.step_times)
    trace.frames = torch.from_numpy(np.asarray(result.frames[0], dtype=np.float32))
    with torch.no_grad():
        posterior = pipe.vae.encode(clip_of(trace.frames, dtypes["vae"], device)).latent_dist
    trace.moments = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
    return trace


def _arguments(parameters: Mapping[str, Any], request: Request, defaults: Mapping[str, Any]) -> dict[str, Any]:
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
