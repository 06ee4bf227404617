"""Names that are hashes: of rows, requests, what else decides pixels, and items; and the seeds of samples.

What goes into each hash is a promise: change it, and every finished run plans other items. Standard library only;
refuses to know where the values come from. All hashes are the first 32 hexadecimal digits of a sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from vidgen.types import MEDIA_FIELDS, Request

SEED_BYTES = 6
"""Seeds lie below 2**48."""


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """What decides pixels beside the request. `codec` is (format, codec, crf); `inexact` the opted-in approximations
    (quantization, an inexact attention kernel) by key."""

    family: str
    revision: int
    checkpoint_hash: str
    sampler: str
    shift: float | None
    sigmas: tuple[float, ...] | None
    timesteps: tuple[float, ...] | None
    dtype: str | None
    loras: tuple[Any, ...]
    tiling: tuple[int, int, int, int] | None
    codec: tuple[str, str, int]
    inexact: tuple[tuple[str, str], ...] = ()


def row_id(fields: Mapping[str, Any], occurrence: int) -> str:
    """The id of a row without an id column: a hash of its generation fields (null ones left out) and how many equal
    rows stand before it in the whole input."""
    return row_id_of(row_key(fields), occurrence)


def row_key(fields: Mapping[str, Any]) -> bytes:
    """The part of `row_id` that equal rows share: 32 bytes."""
    return sha256(_canonical({name: value for name, value in fields.items() if value is not None})).digest()


def row_id_of(key: bytes, occurrence: int) -> str:
    """`row_id` from `row_key`."""
    return sha256(b"row\0%b%d" % (key, occurrence)).hexdigest()[:32]


def sample_seed(run_seed: int, row: str, row_seed: int | None, sample: int) -> int:
    """The seed of sample `sample` of a row: the row's own for sample 0; below 2**48. Equal for all variants."""
    if row_seed is None:
        text = f"run\0{run_seed}\0{sample}\0{row}"
    elif sample == 0:
        return row_seed
    else:
        text = f"row\0{row_seed}\0{sample}"
    return int.from_bytes(sha256(text.encode()).digest()[:SEED_BYTES], "big")


def shape_digest(request: Request) -> str:
    """A hash of the request's values but prompts, seed and media: what rows of one shape share."""
    values = {
        "task": request.task,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "fps": float(request.fps),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "params": dict(request.params),
        "media": {},  # they have a hash of their own; this stands for finished runs, whose names hash it
    }
    return sha256(_canonical(values)).hexdigest()[:32]


def media_digest(digests: Mapping[str, str], resize: str) -> str:
    """A hash of conditioning media (field -> digest of its bytes) and how they meet the size; "" if there are none."""
    return sha256(_canonical({"media": digests, "resize": resize})).hexdigest()[:32] if digests else ""


def request_hash_of(shape: str, seed: int, prompt: str, negative_prompt: str, media: str = "") -> str:
    """`request_hash` from `shape_digest` and `media_digest`; for planners of many rows."""
    text = f"{shape}\0{seed}\0{len(negative_prompt)}\0{negative_prompt}{prompt}"
    if media:
        text = f"{media}\0{text}"  # 32 digits, then 32 more: nothing without media reads so
    return sha256(text.encode()).hexdigest()[:32]


def request_hash(request: Request) -> str:
    """A hash of the resolved values: prompts, media (and, where there are any, how they are resized), the sample's
    seed, params and sizes."""
    given = {name: media.digest for name in MEDIA_FIELDS if (media := getattr(request, name)) is not None}
    media = media_digest(given, request.resize)
    return request_hash_of(shape_digest(request), request.seed, request.prompt, request.negative_prompt, media)


def spec_hash(spec: PixelSpec) -> str:
    """A hash of everything else that changes pixels."""
    values = {name: getattr(spec, name) for name in PixelSpec.__slots__}
    return sha256(_canonical(values)).hexdigest()[:32]


def item_id(row: str, sample: int, request: str, spec: str) -> str:
    """The item's name, from its row, its sample and the two hashes."""
    return sha256(f"{sample}\0{request}\0{spec}\0{row}".encode()).hexdigest()[:32]


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
