"""Any pipeline class of the diffusers library that returns frames: limits, defaults and cost (the contract in
`vidgen.family.Spec`). Standard library only; the library's source is read, never imported.

What a class takes depends on the class, so `bound` makes the Spec of one; the module's own names say what holds for
all. Refuses to know what a tensor is and where components lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import vidgen.models.diffusers.known as known
import vidgen.models.diffusers.params as bindings
import vidgen.models.diffusers.source as source
from vidgen.errors import ConfigError
from vidgen.models.diffusers.options import Options
from vidgen.models.diffusers.params import Params as Params
from vidgen.models.diffusers.params import is_a
from vidgen.specs.limits import MEDIA, branches, check_task, check_tiling_mode, tile_problems
from vidgen.specs.limits import batch_key as shared_batch_key
from vidgen.types import Request

REVISION = 1
TASKS: Mapping[str, Mapping[str, bool]] = {
    "t2v": {},
    "i2v": {"image": True, "last_image": False},
    "v2v": {"video": True, "image": False},
}
CHECKPOINT = True
PIPELINES: Mapping[str, str] = {}
COMPONENTS: tuple[str, ...] = ()
PARAMS: Mapping[str, type] = {}
SAMPLERS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """The Spec of one pipeline class and checkpoint: what differs from class to class is here."""

    params: Params
    TASKS: Mapping[str, Mapping[str, bool]]
    PARAMS: Mapping[str, type]
    SAMPLERS: tuple[str, ...]
    REVISION: int = REVISION
    CHECKPOINT: bool = True
    PIPELINES: Mapping[str, str] = field(default_factory=dict)
    COMPONENTS: tuple[str, ...] = ()

    def read(self, configs: Mapping[str, Mapping[str, Any]]) -> Params:
        return self.params

    def defaults(self, task: str, params: Params) -> dict[str, Any]:
        return defaults(task, params)

    def problems(self, request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
        return problems(request, params, parallel)

    def frames_out(self, request: Request) -> int:
        return frames_out(request)

    def tiling(self, mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
        return tiling(mode, request, params)

    def batch_key(self, request: Request, params: Params) -> str:
        return batch_key(request, params)

    def tokens(self, request: Request, params: Params) -> int:
        return tokens(request, params)

    def flops(self, request: Request, params: Params) -> float:
        return flops(request, params)

    def weight_bytes(self, params: Params) -> int:
        return weight_bytes(params)

    def heads(self, params: Params) -> int:
        return heads(params)

    def text_limit(self, params: Params) -> tuple[str, int] | None:
        return text_limit(params)


def bound(params: Params) -> Bound:
    """The Spec of a pipeline class bound to a checkpoint."""
    kinds = {name: a.kind for name, a in params.own.items() if a.kind is not None}
    return Bound(params, tasks(params), kinds, samplers(params))


def read(configs: Mapping[str, Mapping[str, Any]]) -> Params:
    """The pipeline that model_index.json names, without options."""
    return bindings.read(configs, None, Options())


def tasks(params: Params) -> dict[str, dict[str, bool]]:
    """Tasks of a class, each with the media it takes: true for one that it cannot do without."""
    takes = [name for name in MEDIA if params.argument(name) is not None]
    needs_image = "image" in takes and bool(known.NEEDS_IMAGE.search(params.pipeline))
    needs_video = "video" in takes and bool(known.NEEDS_VIDEO.search(params.pipeline))
    found: dict[str, dict[str, bool]] = {}
    if not needs_image and not needs_video and not any(a.required for a in params.call if a.name in takes):
        found["t2v"] = {}
    if "image" in takes and not needs_video:
        found["i2v"] = {"image": True, **({"last_image": False} if "last_image" in takes else {})}
    if "video" in takes:
        found["v2v"] = {"video": True, **({"image": False} if "image" in takes else {})}
    return found


def samplers(params: Params) -> tuple[str, ...]:
    """Scheduler classes that may stand for the pipeline's own, which comes first."""
    return bindings.samplers(params.class_of("scheduler"))


def defaults(task: str, params: Params) -> dict[str, Any]:
    """What the call's own defaults, the configs' sizes and the model cards say, in this order. ConfigError for a task
    that the class does not do, and for a size that none of them names."""
    check_task(task, tasks(params), f"diffusers {params.pipeline}")
    given: dict[str, Any] = {}
    for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt", "fps"):
        argument = params.argument(name)
        given[name] = argument.default if argument is not None else None
    length = {} if params.argument("num_frames") is not None else {"num_frames": known.VIDEO_FRAMES}
    cards = {**length, **dict(params.native), **known.DEFAULTS.get(params.pipeline, {})}
    for name in ("height", "width", "num_frames"):
        given[name] = given[name] or cards.get(name)
        if given[name] is None:
            raise ConfigError(
                f"sampling.{name}: {params.pipeline} has no default for it, and neither has the checkpoint's config; "
                "model_index.json and the denoiser's config.json are read"
            )
    scheduler = dict(params.scheduler)
    return {
        **given,
        "fps": float(given["fps"] or known.fps_of(params.pipeline)),
        "num_inference_steps": given["num_inference_steps"] or 50,
        "guidance_scale": float(given["guidance_scale"] if given["guidance_scale"] is not None else 1.0),
        "negative_prompt": given["negative_prompt"] or "",
        "sampler": params.class_of("scheduler"),
        "shift": scheduler.get("shift", scheduler.get("flow_shift")),
        "sigmas": None,
        "timesteps": None,
        "params": {name: a.default for name, a in params.own.items() if a.known and not a.required},
    }


def problems(request: Request, params: Params, parallel: Mapping[str, Any]) -> list[str]:
    """Each rule the request breaks, as a sentence with the wrong value and the allowed ones; [] if none."""
    found = _media_problems(request, params) + _param_problems(request, params) + _number_problems(request, params)
    found += _size_problems(request, params) + _schedule_problems(request, params)
    found += _way_back_problems(request, params)
    if request.tiling is not None and params.tiles is None:
        found.append(f"tiling is {request.tiling}; {params.class_of('vae') or params.pipeline} does not tile")
    return found + tile_problems(request, params.factor)


def _media_problems(request: Request, params: Params) -> list[str]:
    does = tasks(params)
    if request.task not in does:
        return [f"task is {request.task!r}; allowed for {params.pipeline}: {', '.join(does)}"]
    takes, found = does[request.task], []
    for name in MEDIA:
        given = getattr(request, name) is not None
        if given and name not in takes:
            found.append(f"{name} is given; {request.task} of {params.pipeline} takes {', '.join(takes) or 'none'}")
        elif takes.get(name, False) and not given:
            found.append(f"{name} is missing; {request.task} of {params.pipeline} needs one")
    return found


def _param_problems(request: Request, params: Params) -> list[str]:
    own, found = params.own, []
    given = dict(request.params)
    for name, value in given.items():
        argument = own.get(name)
        if argument is None:
            allowed = ", ".join(own) or "there are none"
            found.append(f"params.{name} is not an argument of {params.pipeline}; allowed: {allowed}")
        elif value is None and argument.default is not None and argument.known:
            found.append(f"params.{name} is null; it must be {_word(argument.kind)}")
        elif value is not None and argument.kind is not None and not is_a(value, argument.kind):
            found.append(f"params.{name} is {value!r}; it must be {_word(argument.kind)}")
        elif argument.choices and value not in argument.choices:
            found.append(f"params.{name} is {value!r}; allowed: {', '.join(map(str, argument.choices))}")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"params.{name} is {value}, which is not a finite number")
    for name, argument in own.items():
        if argument.required and name not in given:
            found.append(f"params.{name} is missing; {params.pipeline} has no default for it")
    return found


def _number_problems(request: Request, params: Params) -> list[str]:
    found = []
    if not 0 <= request.seed < 2**48:
        found.append(f"seed is {request.seed}; allowed: 0 to 2**48 - 1")
    fps, rate = request.fps, params.argument("fps")
    if not (math.isfinite(fps) and fps > 0):
        found.append(f"fps is {fps}; allowed: more than 0")
    elif rate is not None and rate.kind is int and fps != int(fps):
        found.append(f"fps is {fps}; {params.pipeline} takes whole numbers of frames a second")
    scale = request.guidance_scale
    if not (math.isfinite(scale) and scale >= 0):
        found.append(f"guidance_scale is {scale}; allowed: 0 or more")
    elif params.argument("guidance_scale") is None and scale != 1:
        others = [name for name in params.own if "guidance" in name]
        hint = f" (it has params.{', params.'.join(others)})" if others else ""
        found.append(f"guidance_scale is {scale:g}; {params.pipeline} has no such argument{hint}, allowed: 1")
    elif params.pipeline in known.GUIDED_ONLY and scale <= 1:
        found.append(f"guidance_scale is {scale:g}; {params.pipeline} only runs guided, allowed: more than 1")
    if request.negative_prompt and params.argument("negative_prompt") is None:
        found.append(f"negative_prompt is given; {params.pipeline} has no such argument, allowed: empty")
    return found


def _size_problems(request: Request, params: Params) -> list[str]:
    found, step = [], params.frame_step
    for name in ("height", "width"):
        size = getattr(request, name)
        if size <= 0 or size % params.multiple:
            found.append(f"{name} is {size}; allowed: positive multiples of {params.multiple}")
    if request.num_frames < 1:
        found.append(f"num_frames is {request.num_frames}; allowed: 1 or more")
    elif step is not None and (request.num_frames - 1) % step:
        found.append(f"num_frames is {request.num_frames}; allowed: 1 + k x {step}")
    return found


def _schedule_problems(request: Request, params: Params) -> list[str]:
    found, steps = [], request.num_inference_steps
    train = dict(params.scheduler).get("num_train_timesteps") or 1000
    if not 1 <= steps <= train:
        found.append(f"num_inference_steps is {steps}; allowed: 1 to {train}")
    if request.sampler not in samplers(params):
        found.append(f"sampler is {request.sampler!r}; allowed: {', '.join(samplers(params))}")
    elif request.shift is not None and shift_name(request.sampler) is None:
        found.append(f"shift is {request.shift}; {request.sampler} has none")
    if request.shift is not None and not (math.isfinite(request.shift) and request.shift > 0):
        found.append(f"shift is {request.shift}; allowed: more than 0")
    if request.sigmas is not None and request.timesteps is not None:
        found.append("sigmas and timesteps are both given; allowed: one of them")
    for name in ("sigmas", "timesteps"):
        values = getattr(request, name)
        if values is None:
            continue
        if params.argument(name) is None:
            found.append(f"{name} is given; {params.pipeline} has no such argument")
        elif len(values) != steps or not all(a > b for a, b in pairwise(values)):
            found.append(f"{name} is {list(values)}; allowed: {steps} (num_inference_steps) strictly falling values")
    return found


def _way_back_problems(request: Request, params: Params) -> list[str]:
    """Text2Video-Zero denoises the first frame to step t1 from the end, on to t0, and takes the others back to t1."""
    if params.pipeline not in known.GUIDED_ONLY:
        return []
    t0, t1, steps = request.param("t0", 44), request.param("t1", 47), request.num_inference_steps
    if isinstance(t0, int) and isinstance(t1, int) and not 0 <= t0 < t1 < steps:
        return [f"params.t0 is {t0} and params.t1 is {t1}; allowed: 0 <= t0 < t1 < num_inference_steps, {steps}"]
    return []


def shift_name(scheduler: str) -> str | None:
    """What a scheduler class calls the shift of its noise levels."""
    takes = {a.name for a in source.initial(scheduler)}
    return next((name for name in ("shift", "flow_shift") if name in takes), None)


def frames_out(request: Request) -> int:
    """Frames of the finished video; a pipeline that returns another number has failed."""
    return request.num_frames


def tiling(mode: str, request: Request, params: Params) -> tuple[int, int, int, int] | None:
    """Tiles for this shape: `on` the library's own of that VAE, where a picture is larger than one; else none."""
    check_tiling_mode(mode)
    if mode != "on" or params.class_of("vae") in known.ALWAYS_TILED:
        return None
    if params.tiles is None:
        vae = params.class_of("vae") or f"{params.pipeline}, which has no VAE,"
        chunked = "; params.decode_chunk_size bounds its memory" if "decode_chunk_size" in params.own else ""
        raise ConfigError(f"engine.vae_tiling: on, and {vae} does not tile{chunked}; allowed: auto, off")
    fits = request.height <= params.tiles[0] and request.width <= params.tiles[1]
    return None if fits else params.tiles


def batch_key(request: Request, params: Params) -> str:
    """Shape, steps and parameters. Requests of one batch run one after the other all the same."""
    return f"{params.pipeline}:{shared_batch_key(request, f'fps={request.fps:g}')}"


def tokens(request: Request, params: Params) -> int:
    """Latent positions that one forward of the denoiser sees."""
    step = params.frame_step or (4 if params.denoiser == "transformer" else 1)
    frames = 1 + (request.num_frames - 1 + step - 1) // step
    grid = params.factor if params.denoiser == "unet" else params.multiple
    return frames * -(-request.height // grid) * -(-request.width // grid)


def flops(request: Request, params: Params) -> float:
    """A rough count: 2 x the denoiser's numbers x positions x forwards, a UNet's by what its levels see of them.
    Attention is left out; where it counts, the native families count it exactly."""
    numbers = sum(dict(params.weights).get(name, (0, 0))[1] for name in (params.denoiser, "controlnet"))
    share = known.UNET_SHARE if params.denoiser == "unet" else 1.0
    forwards = request.num_inference_steps * max(branches(request), 2 if _guided_otherwise(request) else 1)
    return 2.0 * numbers * share * tokens(request, params) * forwards


def _guided_otherwise(request: Request) -> bool:
    names = ("max_guidance_scale", "true_cfg_scale")
    return any(isinstance(value := request.param(name), (int, float)) and value > 1 for name in names)


def weight_bytes(params: Params) -> int:
    """Bytes of all components' tensors as they are stored."""
    return sum(stored for stored, _ in dict(params.weights).values())


def heads(params: Params) -> int:
    """One, whatever is inside: these pipelines are not divided over a gang."""
    return 1


def text_limit(params: Params) -> tuple[str, int] | None:
    """CLIP's tokens where the pipeline has a prompt and its tokenizer can be read without transformers."""
    if params.argument("prompt") is None or params.text_tokens is None:
        return None
    return "tokenizer", params.text_tokens


def _word(kind: type | None) -> str:
    return kind.__name__ if kind is not None else "a scalar"
