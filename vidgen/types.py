"""The words the rooms of vidgen speak to each other: frozen dataclasses, standard library only.

Refuses to know where anything is stored, how it is scheduled, and what a tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Scalar = str | int | float | bool | None

MANIFEST_COLUMNS = (
    *("item_id", "row_id", "sample", "status", "video", "sha256", "bytes", "error_class", "error", "prompt"),
    *("negative_prompt", "seed", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale"),
    *("sampler", "params", "family", "task", "checkpoint", "checkpoint_hash", "loras", "spec_hash", "dtype", "tiling"),
    *("batch", "context", "gpu", "node", "attempt", "generation", "encode_s", "denoise_s", "decode_s", "write_s"),
    *("created_at", "vidgen_version", "origin_file", "origin_row"),
)
"""Manifest columns in their order; the carried input columns follow."""
MEDIA_FIELDS = ("image", "last_image", "video")
"""Request fields that hold conditioning media."""


@dataclass(frozen=True, slots=True)
class Media:
    """A conditioning image or video: where it is and what its bytes hash to.

    `url` is an fsspec URL, an absolute local path, or the place of a Parquet cell (`vidgen.conditioning.places`); ""
    when `data` holds the bytes themselves. `digest` is the sha256 of local bytes, or a hash of (path, size, etag) for
    remote ones; "" for one that no plan has seen, which is then not compared.
    """

    url: str
    digest: str
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One video to make, every value resolved: nothing is left to a default.

    Sizes in pixels and frames, `fps` in frames per second, `seed` below 2**48. `sigmas` and `timesteps` are explicit
    schedules or None. `params` holds what one family alone knows, sorted by name. `tiling` is the VAE tiling that the
    plan resolved for this shape: (tile height, tile width, stride height, stride width) in pixels, or None. `resize` is
    how conditioning media meet height x width: exact, cover or contain.
    """

    task: str
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    tiling: tuple[int, int, int, int] | None = None
    params: tuple[tuple[str, Scalar], ...] = ()
    image: Media | None = None
    last_image: Media | None = None
    video: Media | None = None
    resize: str = "exact"

    def param(self, name: str, default: Scalar = None) -> Scalar:
        """Value of the family parameter `name`, or `default`."""
        return dict(self.params).get(name, default)


@dataclass(frozen=True, slots=True)
class Item:
    """A planned request and where it came from. `ordinal` is its place in the plan; `batch_key` names the items it may
    share a batch with; `tokens` and `flops` are the family's own count for the whole item."""

    ordinal: int
    item_id: str
    row_id: str
    sample: int
    request: Request
    request_hash: str
    spec_hash: str
    batch_key: str
    tokens: int
    flops: float
    priority: int = 0
    origin_file: str = ""
    origin_row: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """The terminal state of one item: what a commit object holds, and what the manifest adds to the plan.

    `status` is done, failed or quarantined. Seconds are wall time; `*_at` are seconds since the epoch. `threads` are
    torch's, 0 where that was left to it; `rungs` what it took to fit it into memory, in the words of
    `vidgen.fleet.judgement.LADDER`.
    """

    item_id: str
    ordinal: int
    status: str
    generation: int
    attempt: int
    video: str = ""
    sha256: str = ""
    bytes: int = 0
    frames: int = 0
    error_class: str = ""
    error: str = ""
    dtype: str = ""
    batch: int = 0
    context: int = 1
    threads: int = 0
    gpu: str = ""
    node: str = ""
    replica: str = ""
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    write_s: float = 0.0
    started_at: float = 0.0
    write_started_at: float = 0.0
    created_at: float = 0.0
    vidgen_version: str = ""
    rungs: str = ""
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Builds a record from a commit's JSON; keys of newer versions are passed over, and those that an
        older one did not write keep their defaults."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known and value is not None})


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a frozen plan: items `first` to `first + items - 1` by ordinal."""

    name: str
    sha256: str
    items: int
    first: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The header of a frozen plan (`plan/{k}/PLAN.json`): everything but the items themselves.

    `config` is the job's configuration as written; `resolved` what null stood for. `counts` holds rows read, items,
    rejected rows, truncated prompts. `estimate` is arithmetic, not measurement.
    """

    k: int
    vidgen_version: str
    family: str
    task: str
    checkpoint: str
    checkpoint_hash: str
    spec_revision: int
    spec_hash: str
    config: Mapping[str, Any]
    resolved: Mapping[str, Any]
    parts: tuple[Part, ...]
    rejected: tuple[Part, ...]
    counts: Mapping[str, int]
    estimate: Mapping[str, Any]
    carried: tuple[str, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter to fuse: a safetensors file, a folder with one, a place on the hub or any fsspec URL of these; its
    weight; and the component it is for where its keys do not say (default: transformer)."""

    path: str
    weight: float = 1.0
    component: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What to load and how to run it, as the keys of `model` and `engine` in a configuration name it.

    `checkpoint` is `demo`, a folder, a hub id (at `revision`), or any fsspec URL of a folder. `family` auto reads
    model_index.json. `dtype` None is the published one of each component. `device` auto is the GPU if there is one.
    `threads` are torch's, for the whole process. Remote checkpoints are copied to `cache_dir` (default
    ~/.cache/vidgen); one whose hash is not `expected_hash` is refused. `pipeline` and `options` are the diffusers
    family's: a class of the library, and what else it is made with, as (name, value).
    """

    checkpoint: str = "demo"
    family: str = "auto"
    task: str = "t2v"
    revision: str | None = None
    loras: tuple[Lora, ...] = ()
    pipeline: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str | None = None
    device: str = "auto"
    offload: str = "none"
    quantization: str | None = None
    compile: str = "auto"
    attention: str = "auto"
    threads: int | None = None
    cache_dir: str | None = None
    expected_hash: str | None = None


@dataclass(slots=True)
class Hooks:
    """What the engine tells and asks while it works; every default does nothing.

    `progress(stage, step, steps)` is called at each stage and denoising step and is the heartbeat; `cancelled()` is
    asked between steps, and True ends the batch with `errors.Cancelled`; `save(state)` is offered the loop's state
    (step, latents, history, generator states) after each step, `resume(requests)` may give one back before the first.
    `rungs` says how sparing with memory to be (of `vidgen.fleet.judgement.LADDER`); none changes pixels.
    """

    progress: Callable[[str, int, int], None] = lambda stage, step, steps: None
    cancelled: Callable[[], bool] = lambda: False
    save: Callable[[Any], None] | None = None
    resume: Callable[[Any], Any] = lambda requests: None
    rungs: tuple[str, ...] = ()


@dataclass(slots=True)
class Video:
    """One generated video. `chunks` yields uint8 RGB arrays of shape [frames, height, width, 3] as they are decoded;
    it is read once, before the next video of the same batch. `encoded` is set instead by a backend that makes the
    file's bytes itself. `seconds` holds encode, denoise and decode time (decode is complete once `chunks` is read)."""

    request: Request
    chunks: Iterator[Any]
    dtype: str
    batch: int = 1
    context: int = 1
    encoded: bytes | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
