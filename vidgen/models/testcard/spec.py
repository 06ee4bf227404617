"""The test card's half of the family contract: any size, no weights, and knobs to try a cluster with.

`sampling.params` of this family:
  step_seconds  seconds that each step takes (0: as fast as it goes)
  ready         hand over the ready bytes of one mp4, made once per process and shape: measures everything but pixels
  fail          what goes wrong, to see a cluster's failure handling before it matters:
                item (an error of the row), nan (what not-a-number latents would be), capacity (out of memory),
                crash (the process kills itself), hang (no step and no heartbeat any more), black (a black clip)
  fail_share    the share of the items, chosen by their seed, that fail so (1: all)

Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import ConfigError
from vidgen.types import MEDIA_FIELDS, Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {
    "t2v": {},
    "i2v": {"image": True, "last_image": False},
    "v2v": {"video": True},
}
CHECKPOINT = False
PIPELINES: Mapping[str, str] = {}
COMPONENTS: tuple[str, ...] = ()
PARAMS: Mapping[str, type] = {"step_seconds": float, "ready": bool, "fail": str, "fail_share": float}
SAMPLERS = ("card",)
FAILURES = ("", "item", "nan", "capacity", "crash", "hang", "black")

SMALLEST, LARGEST = 8, 4096
MOST_FRAMES = 10_000
MOST_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Params:
    """A test card has no sizes of its own."""


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """There is no checkpoint to read."""
    return Params()


def defaults(task: str, params: Params) -> dict[str, Any]:
    """Small and quick: 64 x 64 pixels, 17 frames, 8 fps, 4 steps. ConfigError for a task it cannot do."""
    if task not in TASKS:
        raise ConfigError(f"model.task: {task!r} is not a task of testcard; allowed: {', '.join(TASKS)}")
    return {
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "fps": 8.0,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "sampler": SAMPLERS[0],
        "shift": None,
        "params": {"step_seconds": 0.0, "ready": False, "fail": "", "fail_share": 1.0},
    }


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence."""
    found = [
        f"{name} is {value}; a test card can be {least} to {most}"
        for name, value, least, most in (
            ("height", request.height, SMALLEST, LARGEST),
            ("width", request.width, SMALLEST, LARGEST),
            ("num_frames", request.num_frames, 1, MOST_FRAMES),
            ("num_inference_steps", request.num_inference_steps, 1, MOST_STEPS),
        )
        if not least <= value <= most
    ]
    fail, share, pause = request.param("fail", ""), request.param("fail_share", 1.0), request.param("step_seconds", 0.0)
    if fail not in FAILURES:
        found.append(f"params.fail is {fail!r}; allowed: {', '.join(repr(name) for name in FAILURES)}")
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        found.append(f"params.fail_share is {share!r}; allowed: 0 to 1")
    if not isinstance(pause, (int, float)) or pause < 0:
        found.append(f"params.step_seconds is {pause!r}; allowed: 0 or more")
    if request.sampler not in SAMPLERS:
        found.append(f"sampler is {request.sampler!r}; allowed: {', '.join(SAMPLERS)}")
    for name in ("shift", "sigmas", "timesteps"):
        if getattr(request, name) is not None:
            found.append(f"{name} is given, and a test card has no use for it")
    return found + _media_problems(request)


def _media_problems(request: Request) -> list[str]:
    if request.task not in TASKS:
        return [f"task is {request.task!r}; allowed: {', '.join(TASKS)}"]
    takes, found = TASKS[request.task], []
    for name in MEDIA_FIELDS:
        given = getattr(request, name) is not None
        if given and name not in takes:
            found.append(f"{name} is given; {request.task} takes {', '.join(takes) or 'none'}")
        if not given and takes.get(name, False):
            found.append(f"{name} is missing; {request.task} needs one")
    return found


def frames_out(request: Request) -> int:
    return request.num_frames


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Never tiled: there is no VAE."""
    return None


def batch_key(request: Request, params: Params) -> str:
    """Shape, steps and knobs: cards of one batch take their steps together."""
    knobs = ",".join(f"{name}={value}" for name, value in request.params)
    shape = f"{request.height}x{request.width}x{request.num_frames}@{request.fps:g}"
    return f"{request.task} {shape} {request.num_inference_steps} {knobs}"


def tokens(request: Request, params: Params) -> int:
    """What a transformer with the usual 4 x 16 x 16 pixels a token would see."""
    latent_frames = (request.num_frames + 3) // 4
    return latent_frames * -(-request.height // 16) * -(-request.width // 16)


def flops(request: Request, params: Params) -> float:
    """About ten operations a pixel, once: a card costs its drawing, not its steps."""
    return 10.0 * 3 * request.height * request.width * request.num_frames


def weight_bytes(params: Params) -> int:
    return 0


def heads(params: Params) -> int:
    return 1


def text_limit(params: Params) -> tuple[str, int] | None:
    return None


def fails(request: Request) -> str:
    """The failure that this request asks for, or ""; whether it is one of `fail_share` depends on its seed alone."""
    fail = str(request.param("fail", "") or "")
    share = float(request.param("fail_share", 1.0) or 0.0)
    draw = int.from_bytes(hashlib.sha256(f"fail {request.seed}".encode()).digest()[:6], "big") / 2**48
    return fail if fail and draw < share else ""
