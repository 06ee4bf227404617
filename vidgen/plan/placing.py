"""A configuration's `parallel` against a plan: on which gangs its shapes are made, asked when the plan is made and at
every start.

Shapes are kept in a plan's estimate, so that a resume with another `parallel` is judged without reading a row. Refuses
to know rows, and the machines of a cluster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from vidgen import memory
from vidgen.config import JobConfig, to_dict
from vidgen.errors import ConfigError
from vidgen.parallel.layout import is_single
from vidgen.placement import Placement, Planned
from vidgen.plan.model import Model, resolve
from vidgen.types import MEDIA_FIELDS, Media, Plan, Request

OWN = ("task", "prompt", "negative_prompt", "seed")
"""Of a request: what is no part of its shape."""


def placement(config: JobConfig, model: Model) -> Placement:
    """ConfigError for gangs of a family that has none, and for a mesh that this model's heads do not allow."""
    parallel = to_dict(config)["parallel"]
    if not is_single(parallel) and importlib.util.find_spec(f"vidgen.models.{model.family}.pipeline") is None:
        raise ConfigError(
            f"parallel: gangs are asked for; {model.family} runs on one GPU, allowed: context 1 and cfg 1"
        )
    sizing = memory.sizing(
        model.family,
        model.spec,
        model.params,
        dtype=config.model.dtype,
        offload=config.engine.offload,
        quantization=config.engine.quantization,
    )
    return Placement(sizing, parallel, model.spec.heads(model.params))


def settled(plans: Sequence[Plan], config: JobConfig, gpus: int) -> Placement | None:
    """How a run's items are made on a cluster of so many GPUs, `parallel.degree: auto` resolved; None where each has a
    GPU of its own. ConfigError where that cannot work."""
    if is_single(to_dict(config)["parallel"]):
        return None
    found, shapes = placement(config, resolve(config)), planned(plans)
    if found.auto and not shapes:
        raise ConfigError(
            f"parallel.degree: auto: this plan was made by vidgen {plans[-1].vidgen_version}, which did not keep its "
            "shapes; allowed: null, or a whole number"
        )
    return found.settled(shapes, gpus)


def check(plans: Sequence[Plan], config: JobConfig) -> None:
    """Refuses a `parallel` or `engine` that differs from the plan's and cannot make its shapes: ConfigError, with the
    numbers."""
    now = to_dict(config)
    rooms = ("parallel", "engine")
    if all(plan.config[room] == now[room] for plan in plans for room in rooms):
        return
    if now["parallel"]["gpu"] is None and is_single(now["parallel"]):
        return
    shapes = planned(plans)
    found = placement(config, resolve(config)).settled(shapes)
    for shape in shapes:
        found.of(shape)


def planned(plans: Iterable[Plan]) -> list[Planned]:
    """The shapes of these plans; of more than an estimate tells apart, the largest of the rest."""
    return [
        Planned(entry["shape"], _request(plan.config["model"]["task"], entry["request"]), *_cost(entry))
        for plan in plans
        for entry in plan.estimate["shapes"]
        if "request" in entry  # absent from plans of before
    ]


def template(request: Request) -> dict[str, Any]:
    """A request's shape as JSON has it, for an estimate: all that is not its own, and which media there are."""
    values = {f.name: getattr(request, f.name) for f in fields(Request) if f.name not in (*OWN, *MEDIA_FIELDS)}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    listed["params"] = [list(pair) for pair in request.params]
    return {**listed, "media": [name for name in MEDIA_FIELDS if getattr(request, name) is not None]}


def _request(task: str, values: Mapping[str, Any]) -> Request:
    known: dict[str, Any] = {name: value for name, value in values.items() if name != "media"}
    for name in ("sigmas", "timesteps", "tiling"):
        known[name] = None if known[name] is None else tuple(known[name])
    known["params"] = tuple((name, value) for name, value in known["params"])
    known |= {name: Media("", "") for name in values["media"]}
    return Request(task=task, prompt="", negative_prompt="", seed=0, **known)


def _cost(entry: Mapping[str, Any]) -> tuple[int, float, int]:
    return entry["tokens"], entry["tflops_per_item"] * 1e12, entry["items"]
