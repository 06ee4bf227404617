"""What a row's numbers amount to: defaults, configuration, cells and sweep resolved into one shape, checked once.

A shape is a request without its prompts and seed. Most datasets have a handful, so everything that does not depend on
the text (limits, tiling, tokens, cost, hashes) is computed here once a shape. Refuses to know Parquet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from vidgen import formats, identity
from vidgen.config import JobConfig, to_dict
from vidgen.config_rules import nearest
from vidgen.errors import ConfigError
from vidgen.plan.frozen import INEXACT_ATTENTION
from vidgen.plan.model import Model
from vidgen.types import MEDIA_FIELDS, Media, Request, Scalar

NUMBERS: Mapping[str, type] = {
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": float,
    "num_inference_steps": int,
    "guidance_scale": float,
}
"""Request fields that a cell may give, with their type."""
LISTS = ("sigmas", "timesteps")
PLACEHOLDER = Media("", "")
MOST_SHAPES = 100_000
"""Shapes remembered at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A request template (media stand in it without place or digest) with its hashes and cost; `reasons` says why it
    cannot be made, and then the rest is empty. `frames` are those of the finished video."""

    request: Request
    reasons: tuple[str, ...]
    digest: str = ""
    spec_hash: str = ""
    batch_key: str = ""
    tokens: int = 0
    flops: float = 0.0
    frames: int = 0

    @property
    def label(self) -> str:
        """What a person calls it: 832x480, 81 frames, 50 steps."""
        return label_of(self.request, self.frames)


def label_of(request: Request, frames: int) -> str:
    """What a person calls a request's shape, where the video has so many frames."""
    guided = "" if request.guidance_scale > 1 else ", no guidance"
    return f"{request.width}x{request.height}, {frames} frames, {request.num_inference_steps} steps{guided}"


class Shaper:
    """Resolves (cells, variant) to a Shape. `fields` are the mapped columns that shape depends on, in order: those of
    NUMBERS and `params.*`. `defaults` overrides the family's (an extended plan keeps what the first resolved)."""

    def __init__(self, config: JobConfig, model: Model, defaults: Mapping[str, Any] | None = None) -> None:
        self.config, self.model = config, model
        self._parallel = to_dict(config)["parallel"]
        family_defaults = defaults or model.spec.defaults(config.model.task, model.params)
        self.base = self._base(family_defaults)
        self.fields = tuple(f for f in config.dataset.columns if f in NUMBERS or f.startswith("params."))
        takes = model.spec.TASKS[config.model.task]
        self.required = tuple(name for name in MEDIA_FIELDS if takes.get(name, False))
        self.variants = self._variants()
        self._cache: dict[tuple[Any, ...], tuple[Shape, ...]] = {}
        self._refuse_impossible()

    def type_of(self, field: str) -> type:
        """The type of a mapped field's cells; ConfigError if the family has no such parameter."""
        return NUMBERS[field] if field in NUMBERS else self._param_type(field, f"dataset.columns.{field}")

    def shapes(self, cells: tuple[Any, ...], media: tuple[str, ...] = ()) -> tuple[Shape, ...]:
        """One shape a variant for a row whose `fields` have these values (None: empty) and that gives these media."""
        found = self._cache.get((cells, media))
        if found is None:
            if len(self._cache) >= MOST_SHAPES:
                self._cache.clear()
            given = {name: value for name, value in zip(self.fields, cells, strict=True) if value is not None}
            found = tuple(
                self._naming(self._shape({**self.base, **given, **variant}, media), given.keys() - variant.keys())
                for variant in self.variants
            )
            self._cache[cells, media] = found
        return found

    def spec_hash(self) -> str:
        """The job's own: of its base values, without tiling. Items carry the hash of their shape."""
        return self._spec_hash(self._request(self.base))

    def resolved(self) -> dict[str, Any]:
        """What every sampling field stands for where neither cell nor sweep says otherwise."""
        sampling = {name: value for name, value in self.base.items() if not name.startswith("params.")}
        params = {name[len("params.") :]: value for name, value in self.base.items() if name.startswith("params.")}
        return {**sampling, "seed": self.config.sampling.seed or 0, "params": params}

    def _base(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Family defaults under the configuration; params flattened to `params.*`."""
        sampling = to_dict(self.config)["sampling"]
        base = {name: defaults.get(name) for name in sampling if name not in ("seed", "params")}
        base.update({name: v for name, v in sampling.items() if name in base and v is not None})
        given = {f"params.{name}": value for name, value in sampling["params"].items() if value is not None}
        for name, value in given.items():
            self._check_param(name, value, f"sampling.{name}")
        params = {f"params.{name}": value for name, value in (defaults.get("params") or {}).items()}
        return {**base, **params, **given}

    def _variants(self) -> list[dict[str, Any]]:
        over = self.config.sweep.over
        for name, values in over.items():
            if name.startswith("params."):
                for value in values:
                    self._check_param(name, value, f"sweep.over.{name}")
        mode = self.config.sweep.mode
        combined = zip(*over.values(), strict=True) if mode == "zip" else itertools.product(*over.values())
        variants = [dict(zip(over, values, strict=True)) for values in combined] if over else [{}]
        seen: dict[Request, dict[str, Any]] = {}
        for variant in variants:
            twin = seen.setdefault(self._request({**self.base, **variant}), variant)
            if twin is not variant:
                both = f"{json.dumps(twin)} and {json.dumps(variant)}"
                raise ConfigError(f"sweep.over: the variants {both} resolve alike")
        return variants

    def _refuse_impossible(self) -> None:
        """What no cell can mend is the configuration's mistake."""
        if self.fields:
            return
        mapped = tuple(n for n in MEDIA_FIELDS if n in self.required or n in self.config.dataset.columns)
        most = self.shapes((), mapped)
        for variant, shape, filled in zip(self.variants, self.shapes((), self.required), most, strict=True):
            if shape.reasons and filled.reasons:
                where = f"sweep variant {json.dumps(variant)}" if variant else "sampling"
                raise ConfigError("\n".join(f"{where}: {reason}" for reason in shape.reasons))

    def _shape(self, values: Mapping[str, Any], media: tuple[str, ...]) -> Shape:
        spec, params = self.model.spec, self.model.params
        given: dict[str, Any] = dict.fromkeys(media, PLACEHOLDER)
        request = replace(self._request(values), **given)
        output = self.config.output
        reasons = spec.problems(request, params, self._parallel)
        if not reasons:
            tiling = spec.tiling(str(self.config.engine.vae_tiling), request, params)
            request = replace(request, tiling=tiling)
            reasons = spec.problems(request, params, self._parallel) if tiling else []
            size = (request.height, request.width)
            reasons += formats.problems(output.format, self.model.codec, output.crf, size, request.fps)
        if reasons:
            return Shape(request, tuple(reasons))
        return Shape(
            request=request,
            reasons=(),
            digest=identity.shape_digest(request),
            spec_hash=self._spec_hash(request),
            batch_key=spec.batch_key(request, params),
            tokens=spec.tokens(request, params),
            flops=spec.flops(request, params),
            frames=spec.frames_out(request),
        )

    def _naming(self, shape: Shape, from_cells: Set[str]) -> Shape:
        """Reasons that are about a cell name its column."""
        if not shape.reasons:
            return shape
        columns = self.config.dataset.columns
        named = []
        for reason in shape.reasons:
            field = reason.partition(" ")[0].rstrip(":")
            named.append(
                reason.replace(field, f"{field} (column {columns[field]!r})", 1) if field in from_cells else reason
            )
        return replace(shape, reasons=tuple(named))

    def _request(self, values: Mapping[str, Any]) -> Request:
        params = sorted(
            (name[len("params.") :], self._param(name, v)) for name, v in values.items() if name.startswith("params.")
        )
        lists: dict[str, Any] = {name: values[name] and tuple(float(v) for v in values[name]) for name in LISTS}
        numbers: dict[str, Any] = {name: kind(values[name]) for name, kind in NUMBERS.items()}
        return Request(
            task=self.config.model.task,
            prompt="",
            negative_prompt=values["negative_prompt"] or "",
            seed=0,
            sampler=values["sampler"],
            shift=None if values["shift"] is None else float(values["shift"]),
            params=tuple(params),
            resize=self.config.dataset.resize,
            **numbers,
            **lists,
        )

    def _spec_hash(self, request: Request) -> str:
        config, model = self.config, self.model
        inexact = dict(model.switches)
        if config.engine.quantization is not None:
            inexact["quantization"] = config.engine.quantization
        if config.engine.attention in INEXACT_ATTENTION:
            inexact["attention"] = config.engine.attention
        return identity.spec_hash(
            identity.PixelSpec(
                family=model.family,
                revision=model.spec.REVISION,
                checkpoint_hash=model.checkpoint_hash,
                sampler=request.sampler,
                shift=request.shift,
                sigmas=request.sigmas,
                timesteps=request.timesteps,
                dtype=config.model.dtype,
                loras=self.model.loras,
                tiling=request.tiling,
                codec=(config.output.format, model.codec, config.output.crf),
                inexact=tuple(sorted(inexact.items())),
            )
        )

    def _check_param(self, name: str, value: Any, key: str) -> None:
        kind = self._param_type(name, key)
        if not is_a(value, kind):
            raise ConfigError(f"{key}: {value!r} has the wrong type; allowed: {kind.__name__}")

    def _param(self, name: str, value: Scalar) -> Scalar:
        """A whole number where the family takes a float is that float, so that 3 and 3.0 are one value."""
        is_float = self.model.spec.PARAMS[name[len("params.") :]] is float
        return float(value) if is_float and value is not None else value

    def _param_type(self, name: str, key: str) -> type:
        known = self.model.spec.PARAMS
        short = name[len("params.") :]
        if short not in known:
            hint = nearest(short, list(known)) if known else "; it has none"
            raise ConfigError(f"{key}: not a parameter of {self.model.family}{hint}")
        return known[short]


def is_a(value: Scalar, kind: type) -> bool:
    """Whether a value may stand where `kind` is wanted: a whole number may stand for a float, a bool for no number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def variant_text(variants: Sequence[Mapping[str, Any]], index: int) -> str | None:
    """A variant as JSON, or None where there is nothing to tell apart."""
    return json.dumps(variants[index], sort_keys=True) if len(variants) > 1 else None
