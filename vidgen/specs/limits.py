"""Rules that every native family has for a request: each broken one is a sentence with the wrong value and the allowed
ones. Standard library only; refuses to know sizes, which differ from family to family.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vidgen.errors import ConfigError
from vidgen.types import Request

MEDIA = ("image", "last_image", "video")


def check_task(task: str, tasks: Mapping[str, Any], family: str) -> None:
    """ConfigError for a task that the family, or this checkpoint of it, does not have."""
    if task not in tasks:
        raise ConfigError(f"model.task: {task!r} is not a task of {family}; allowed: {', '.join(tasks)}")


def request_problems(
    request: Request, tasks: Mapping[str, Mapping[str, bool]], params: Mapping[str, type]
) -> list[str]:
    """Task, media, family parameters, seed, fps and guidance scale. `tasks` maps a task to the media fields it takes,
    true for a required one; `params` the family's own parameters to their types."""
    if request.task not in tasks:
        return [f"task is {request.task!r}; allowed: {', '.join(tasks)}"]
    found = []
    takes = tasks[request.task]
    for name in MEDIA:
        given = getattr(request, name) is not None
        if given and name not in takes:
            found.append(f"{name} is given; {request.task} takes {', '.join(takes) or 'none'}")
        elif takes.get(name, False) and not given:
            found.append(f"{name} is missing; {request.task} needs one")
    for name, value in request.params:
        if name not in params:
            allowed = ", ".join(params) or "there are none"
            found.append(f"params.{name} is not a parameter of this family; allowed: {allowed}")
        elif value is not None and not _is_a(value, params[name]):
            found.append(f"params.{name} is {value!r}; it must be {params[name].__name__}")
    if not 0 <= request.seed < 2**48:
        found.append(f"seed is {request.seed}; allowed: 0 to 2**48 - 1")
    if not (math.isfinite(request.fps) and request.fps > 0):
        found.append(f"fps is {request.fps}; allowed: more than 0")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        found.append(f"guidance_scale is {request.guidance_scale}; allowed: 1 (no guidance) or more")
    return found


def schedule_problems(
    request: Request, samplers: Sequence[str], train_timesteps: int, explicit: Sequence[str] = ("sigmas", "timesteps")
) -> list[str]:
    """Steps, sampler, shift, and explicit schedules, of which the family takes those named in `explicit`."""
    found = []
    steps = request.num_inference_steps
    if not 1 <= steps <= train_timesteps:
        found.append(f"num_inference_steps is {steps}; allowed: 1 to {train_timesteps}")
    if request.sampler not in samplers:
        found.append(f"sampler is {request.sampler!r}; allowed: {', '.join(samplers)}")
    if request.shift is not None and not (math.isfinite(request.shift) and request.shift > 0):
        found.append(f"shift is {request.shift}; allowed: more than 0")
    for name, values, top in (("sigmas", request.sigmas, 1), ("timesteps", request.timesteps, train_timesteps)):
        if values is None:
            continue
        if name not in explicit:
            found.append(f"{name} is given; this family takes {', '.join(explicit) or 'no explicit schedule'}")
            continue
        if len(values) != steps:
            found.append(f"{name} has {len(values)} values; num_inference_steps is {steps}")
        falling = all(a > b for a, b in pairwise(values))
        if not falling or any(not 0 < value <= top for value in values):
            found.append(f"{name} is {list(values)}; allowed: strictly falling values, more than 0, at most {top}")
    return found


def size_problems(request: Request, multiples: tuple[int, int], frames: tuple[int, int]) -> list[str]:
    """Height and width as positive multiples, frames as (first, step): first + k x step."""
    found = []
    first, step = frames
    if request.num_frames < first or (request.num_frames - first) % step:
        found.append(f"num_frames is {request.num_frames}; allowed: {first} + k x {step}")
    for name, multiple in zip(("height", "width"), multiples, strict=True):
        size = getattr(request, name)
        if size <= 0 or size % multiple:
            found.append(f"{name} is {size}; allowed: positive multiples of {multiple}")
    return found


def tile_problems(request: Request, factor: int) -> list[str]:
    """VAE tiles are positive multiples of `factor` pixels, the stride at most the tile."""
    if request.tiling is None:
        return []
    tile, stride = request.tiling[:2], request.tiling[2:]
    whole = all(size > 0 and size % factor == 0 for size in request.tiling)
    if whole and all(a <= b for a, b in zip(stride, tile, strict=True)):
        return []
    return [f"tiling is {request.tiling}; allowed: positive multiples of {factor}, stride at most the tile"]


def check_tiling_mode(mode: str) -> None:
    """ConfigError for anything but auto, on and off."""
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"engine.vae_tiling: {mode!r} is not a mode; allowed: auto, on, off")


def branches(request: Request) -> int:
    """Forwards a step of classifier-free guidance: one at a scale of 1 or less."""
    return 2 if request.guidance_scale > 1 else 1


def batch_key(request: Request, *extra: object) -> str:
    """Equal for items that may share a batch: task, shape, tiles, sampler, schedule, guided or not, and the family's
    parameters; `extra` is what else the family cannot mix. Guidance scales are a vector, so they may differ."""
    schedule = repr((request.sigmas, request.timesteps))
    return ":".join(
        (
            request.task,
            f"{request.height}x{request.width}x{request.num_frames}",
            f"tiles={request.tiling}",
            request.sampler,
            f"steps={request.num_inference_steps}",
            f"shift={request.shift}",
            f"schedule={hashlib.sha256(schedule.encode()).hexdigest()[:8]}",
            f"branches={branches(request)}",
            *(f"{name}={value}" for name, value in request.params),
            *map(str, extra),
        )
    )


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind
