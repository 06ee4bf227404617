"""Requests in, videos out, by any pipeline class of the diffusers library: one call of the pipeline a request.

Random numbers are those of one CPU generator seeded with the row's seed, which for the length of a call is torch's own:
what a pipeline draws without being handed a generator (I2VGenXL's image latents) follows from the row too, in the order
in which `pipe(generator=torch.manual_seed(seed))` draws, and the process's generator is as it was afterwards. On a GPU
such draws come from the GPU's generator, seeded alike. Refuses to know where frames go.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidgen import conditioning
from vidgen.checkpoint.adapter import open_adapter
from vidgen.checkpoint.fetch import fetched
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.conditioning import Conditioning
from vidgen.device import device_named, memory_errors
from vidgen.errors import Cancelled, CheckpointError, ItemError
from vidgen.models.diffusers.assemble import assemble, scheduler, tile
from vidgen.models.diffusers.binding import Binding, bind
from vidgen.models.diffusers.spec import shift_name
from vidgen.models.diffusers.watch import Watch
from vidgen.types import Hooks, ModelSettings, Request, Video

CHUNK = 8
"""Frames handed over at a time."""


def load(settings: ModelSettings) -> Backend:
    """ConfigError and CheckpointError name the key, what is wrong with it and what is allowed."""
    settings = replace(settings, cache_dir=settings.cache_dir or "~/.cache/vidgen")
    assert settings.cache_dir is not None
    device = device_named(settings.device)
    folder = open_checkpoint(settings.checkpoint, settings.revision)
    bound = bind(folder, settings.pipeline, dict(settings.options))
    if settings.expected_hash is not None and bound.checkpoint_hash != settings.expected_hash:
        raise CheckpointError(
            f"{folder.resolved.name}: checkpoint_hash is {bound.checkpoint_hash}; the plan was made with "
            f"{settings.expected_hash}"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    adapters = tuple(open_adapter(lora.path, lora.weight, lora.component) for lora in settings.loras)
    local = fetched(replace(folder, adapters=adapters), settings.cache_dir)
    return Backend(assemble(local, bound, settings, device), bound, device)


class Backend:
    """A pipeline and what is known of it. `gpu` names the processor for the manifest, "" for a CPU."""

    def __init__(self, pipe: Any, bound: Binding, device: torch.device) -> None:
        self.pipe, self.params, self.device = pipe, bound.params, device
        self.checkpoint_hash = bound.checkpoint_hash
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.node = platform.node()
        self.dtype = _dtype_label(pipe)
        config = dict(getattr(getattr(pipe, "scheduler", None), "config", {}))
        self._schedule = {**config, **_plain(bound.params.scheduler)}

    def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        """One Video a request, in order, each made when it is asked for. ItemError (bad media, frames that are not
        finite, black, or another number), CapacityError (out of memory), Cancelled (a hook asked for it)."""
        for number, request in enumerate(requests):
            if hooks.cancelled():
                raise Cancelled(f"before request {number + 1} of {len(requests)}")
            yield self._one(request, hooks)

    def _one(self, request: Request, hooks: Hooks) -> Video:
        hooks.progress("encode", 0, 1)
        media = conditioning.read(request)
        watch = Watch(hooks, request.num_inference_steps, self.device)
        shape = f"{request.num_frames} frames of {request.width} x {request.height}"
        self._prepare(request)
        try:
            with (
                memory_errors(self.device, shape),
                _drawing(request.seed, self.device) as generator,
                watch.on(self.pipe),
            ):
                result = self.pipe(**self._arguments(request, media, generator))
        except BaseException:
            self.pipe.maybe_free_model_hooks()  # what a finished call does itself
            raise
        watch.finish()
        frames = _frames(result, request, self.params.pipeline)
        return Video(
            request=request,
            chunks=_chunks(frames, hooks),
            dtype=self.dtype,
            seconds=watch.seconds,
            counts={"forwards": watch.forwards},
        )

    def _prepare(self, request: Request) -> None:
        """A scheduler without memory of the last call, and the VAE's tiles."""
        if self._schedule:
            named = shift_name(request.sampler)
            self.pipe.scheduler = scheduler(self._schedule, request.sampler, named, request.shift)
        if getattr(self.pipe, "vae", None) is not None:
            tile(self.pipe.vae, request.tiling)

    def _arguments(self, request: Request, media: Conditioning, generator: torch.Generator) -> dict[str, Any]:
        """The call's arguments, under the names it has for them."""
        values: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "image": _picture(media.image),
            "last_image": _picture(media.last_image),
            "video": None if media.video is None else [Image.fromarray(frame) for frame in media.video],
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "fps": request.fps,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "sigmas": None if request.sigmas is None else list(request.sigmas),
            "timesteps": None if request.timesteps is None else list(request.timesteps),
        }
        call: dict[str, Any] = {"generator": generator, "output_type": "np"}
        for field, value in values.items():
            argument = self.params.argument(field)
            if argument is None or (value is None and field != "negative_prompt"):
                continue
            if field == "negative_prompt" and value is None and argument.default is not None:
                value = ""  # some cannot be told None
            call[argument.name] = int(value) if argument.kind is int else value
        takes = {argument.name for argument in self.params.call}
        return {**{name: value for name, value in call.items() if name in takes}, **dict(request.params)}


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Torch's own CPU generator, seeded, for the length of the block; all generators are as they were afterwards."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield torch.manual_seed(seed)


def _frames(result: Any, request: Request, pipeline: str) -> np.ndarray:
    """float [F, H, W, 3] in [0, 1] of what a pipeline returned; ItemError if it is not the video asked for."""
    if any(flags := getattr(result, "nsfw_content_detected", None) or ()):
        count = sum(bool(flag) for flag in flags)
        raise ItemError(f"the checkpoint's safety checker blacked out {count} of {len(flags)} frames")
    found = getattr(result, "frames", None)
    found = getattr(result, "images", None) if found is None else found
    if isinstance(found, torch.Tensor):
        found = found.float().cpu().numpy()
    frames = np.asarray(found)
    if frames.ndim == 5:
        frames = frames[0]
    wanted = (request.num_frames, request.height, request.width, 3)
    if frames.shape != wanted:
        raise ItemError(f"{pipeline} returned frames of shape {list(frames.shape)}, expected {list(wanted)}")
    if not np.isfinite(frames).all():
        raise ItemError(f"decoded frames are not finite: seed {request.seed}, {request.prompt[:80]!r}")
    if not frames.any():
        raise ItemError(f"every frame is black: seed {request.seed}, {request.prompt[:80]!r}")
    return frames


def _chunks(frames: np.ndarray, hooks: Hooks) -> Iterator[np.ndarray]:
    """uint8 [n, H, W, 3]."""
    for first in range(0, len(frames), CHUNK):
        chunk = frames[first : first + CHUNK]
        hooks.progress("decode", first + len(chunk), len(frames))
        yield (chunk.clip(0, 1) * 255).round().astype(np.uint8)


def _picture(pixels: np.ndarray | None) -> Image.Image | None:
    return None if pixels is None else Image.fromarray(pixels)


def _plain(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def _dtype_label(pipe: Any) -> str:
    """One name if all networks agree, else each with its own."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    names = {name: str(part.dtype).removeprefix("torch.") for name, part in networks.items() if hasattr(part, "dtype")}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(names.items()))
