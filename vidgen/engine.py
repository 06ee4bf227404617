"""One model on one GPU (or CPU), or on a gang of them: load a checkpoint, make requests, generate videos. From a
notebook, three lines after `from vidgen import engine, media`:

    model = engine.load("demo")
    for video in model.generate([model.request("a red circle moving left", seed=7)]):
        media.write(video, "circle.mp4")

From a shell, one process, or a gang of them that share the tokens of one clip (`--context`, or `--ulysses` and
`--ring`) and the branches of its guidance (`--cfg 2`):

    python -m vidgen.engine "a red circle moving left" --out circle.mp4
    torchrun --nproc-per-node 2 -m vidgen.engine "a red circle moving left" --out circle.mp4 --context 2

Refuses to know Ray, datasets, and where videos are stored.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vidgen import family as families
from vidgen.checkpoint.adapter import open_adapter
from vidgen.checkpoint.fetch import fetched
from vidgen.checkpoint.folder import CheckpointFolder, open_checkpoint
from vidgen.conditioning import inspect
from vidgen.conditioning.sources import digest_of
from vidgen.device import device_named
from vidgen.errors import CheckpointError, ConfigError, GenerationError, ItemError
from vidgen.family import Spec
from vidgen.loop import Loop
from vidgen.parallel import ALONE
from vidgen.parallel.layout import layout
from vidgen.types import Hooks, Media, ModelSettings, Request, Video

if TYPE_CHECKING:
    from vidgen.parallel.gang import Gang

MEETING_SECONDS = 300.0
"""Within which the processes of torchrun must have come together."""


class Backend(Protocol):
    """What generates: the native loop, or an object that a family's own `backend.py` loads."""

    def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        """One video a request, in order."""


@dataclass
class Engine:
    """A loaded model. `gpu` is the GPU's name, "" on CPU; `checkpoint` and `checkpoint_hash` are "" without weights."""

    family: str
    task: str
    spec: Spec
    params: Any
    backend: Backend
    checkpoint: str
    checkpoint_hash: str
    gpu: str

    def peak_bytes(self) -> int:
        """The most memory of its GPU that tensors have taken so far; 0 without a GPU."""
        return int(torch.cuda.max_memory_allocated()) if self.gpu and torch.cuda.is_initialized() else 0

    def request(self, prompt: str, **overrides: Any) -> Request:
        """A request with the family's defaults for what `overrides` (sampling fields, seed, params, tiling, resize, and
        image, last_image, video as a path, a URL or bytes) leave out.

        ValueError lists each rule that the request breaks, or says what is wrong with a medium.
        """
        known = {f.name for f in fields(Request)} - {"task", "prompt"}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(f"unknown: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        defaults = self.spec.defaults(self.task, self.params)
        values = {"seed": 0, **defaults, **overrides}
        params = {**(defaults.get("params") or {}), **dict(overrides.get("params") or {})}
        values["params"] = tuple(sorted(params.items()))
        for name in ("image", "last_image", "video"):
            values[name] = _medium(name, values.get(name))
        for name in ("sigmas", "timesteps"):
            values[name] = tuple(values[name]) if values.get(name) is not None else None
        request = Request(task=self.task, prompt=prompt, **values)
        problems = self.spec.problems(request, self.params, {})
        if problems:
            raise ValueError("; ".join(problems))
        if "tiling" in overrides:
            return request
        return replace(request, tiling=self.spec.tiling("auto", request, self.params))

    def generate(
        self, requests: Sequence[Request], hooks: Hooks | None = None, batch: int | None = None
    ) -> Iterator[Video]:
        """One video a request, in order; each one's chunks are decoded as they are read.

        Consecutive requests of one batch key share forwards, at most `batch` of them (None: all). Results are bit for
        bit repeatable on CPU at batch 1 and a fixed number of threads. Raises ItemError (NaN), CapacityError (out of
        memory), Cancelled (a hook asked for it).

        Of a gang, every rank calls this with the same requests and reads the chunks of every video: rank 0 gets the
        frames, the others empty chunks, whose reading is their part of the decoding. Rank 0's hooks decide; those of
        the others are told of progress alone.
        """
        hooks = hooks or Hooks()
        if isinstance(self.backend, Loop):
            return self.backend.generate(requests, hooks, batch)
        return self.backend.generate(requests, hooks)


def _medium(name: str, given: Any) -> Media | None:
    """What stands for a conditioning medium in a notebook: nothing, a path or URL, bytes, or a Media."""
    if given is None or isinstance(given, Media):
        return given
    if isinstance(given, bytes):
        return Media("", digest_of(given), given)
    url = str(given) if "://" in str(given) else str(Path(given).absolute())
    try:
        return inspect.at(url, video=name == "video").media
    except ItemError as error:
        raise ValueError(f"{name}: {error}") from error


def load(checkpoint: str = "demo", **settings: Any) -> Engine:
    """Loads a checkpoint: `demo`, a folder, a hub id, or any fsspec URL of a folder; `settings` are those of
    `ModelSettings`, and so are the errors of `load_model`."""
    return load_model(ModelSettings(checkpoint=checkpoint, **settings))


def load_model(settings: ModelSettings, gang: Gang | None = None) -> Engine:
    """ConfigError and CheckpointError name the value and the allowed ones; an option that the engine cannot honour is
    refused. Every rank of a gang loads the model; `device` auto is then the rank's own."""
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"engine.threads: {settings.threads}; allowed: auto or at least 1")
    family, folder = settings.family, None
    if family == "auto" or families.spec(family).CHECKPOINT:
        folder = open_checkpoint(settings.checkpoint, settings.revision)
        family = families.recognise(folder.configs()["model_index"]) if family == "auto" else family
    if gang is not None and gang.size > 1 and importlib.util.find_spec(f"vidgen.models.{family}.pipeline") is None:
        raise ConfigError(f"parallel: a gang of {gang.size}; {family} runs on one GPU, allowed: context 1 and cfg 1")
    cache_dir = str(Path(settings.cache_dir or "~/.cache/vidgen").expanduser())
    if importlib.util.find_spec(f"vidgen.models.{family}.binding") is not None:
        assert folder is not None, f"{family} binds a checkpoint"
        return _bound(folder, replace(settings, family=family, cache_dir=cache_dir))
    if settings.pipeline is not None or settings.options:
        raise ConfigError(f"model.pipeline, model.options: given, and {family} has none; allowed with family diffusers")
    spec = families.spec(family)
    if settings.task not in spec.TASKS:
        raise ConfigError(f"model.task: {settings.task!r} is not a task of {family}; allowed: {', '.join(spec.TASKS)}")
    if folder is not None:
        _check(folder, family, spec, settings.expected_hash)
        adapters = [open_adapter(lora.path, lora.weight, lora.component) for lora in settings.loras]
        folder = folder.with_adapters(adapters, families.adapter_names(family)) if adapters else folder
    params = spec.read(folder.configs() if folder is not None else {})
    spec.defaults(settings.task, params)  # refuses a task that this checkpoint cannot do
    settings = replace(settings, family=family, cache_dir=cache_dir)
    backend: Backend
    if importlib.util.find_spec(f"vidgen.models.{family}.backend") is not None:
        backend = importlib.import_module(f"vidgen.models.{family}.backend").load(settings)
        gpu = str(getattr(backend, "gpu", ""))
    else:
        assert folder is not None, f"{family} has neither weights nor a backend.py"
        backend = _native(fetched(folder, cache_dir), spec, params, settings, gang)
        place = backend.pipeline.device
        gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else ""
    name, digest = (folder.resolved.name, folder.hash()) if folder is not None else ("", "")
    return Engine(family, settings.task, spec, params, backend, name, digest, gpu)


def _bound(folder: CheckpointFolder, settings: ModelSettings) -> Engine:
    """A family whose Spec depends on more than the checkpoint: its `binding.py` makes one of pipeline and options."""
    family = settings.family
    bound = importlib.import_module(f"vidgen.models.{family}.binding").bind(
        folder, settings.pipeline, dict(settings.options)
    )
    bound.spec.defaults(settings.task, bound.params)  # refuses a task that the class does not do
    backend = importlib.import_module(f"vidgen.models.{family}.backend").load(settings)
    name = folder.resolved.name
    return Engine(family, settings.task, bound.spec, bound.params, backend, name, bound.checkpoint_hash, backend.gpu)


def _native(
    folder: CheckpointFolder, spec: Spec, params: Any, settings: ModelSettings, gang: Gang | None = None
) -> Loop:
    """The native loop over the family's `pipeline.py`."""
    _refuse(quantization=(settings.quantization, (None,)), compile=(settings.compile, ("auto", "off")))
    _refuse(attention=(settings.attention, ("auto", "sdpa")), offload=(settings.offload, ("none", "model")))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    pipeline = importlib.import_module(f"vidgen.models.{settings.family}.pipeline")
    if gang is not None and gang.size == 1:
        gang = None
    device = device_named(settings.device) if gang is None or settings.device != "auto" else gang.device
    first = gang is None or gang.first  # who alone reads texts and pictures
    offload = settings.offload == "model"
    room = torch.device("cpu") if offload else device  # where all of it fits
    loaded = pipeline.load(folder, params, task=settings.task, dtype=settings.dtype, device=room, first=first)
    loaded.device = device
    return Loop(loaded, lambda request: spec.batch_key(request, params), ALONE if gang is None else gang, offload)


def _refuse(**options: tuple[Any, tuple[Any, ...]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            choices = ", ".join("null" if choice is None else str(choice) for choice in allowed)
            raise ConfigError(f"engine.{name}: {value!r} is not supported by the native engine; allowed: {choices}")


def _check(folder: CheckpointFolder, family: str, spec: Spec, expected_hash: str | None) -> None:
    name = folder.resolved.name
    found = folder.configs()["model_index"].get("_class_name")
    if spec.PIPELINES and found not in spec.PIPELINES:
        raise CheckpointError(f"{name}: _class_name is {found!r}; {family} runs {', '.join(spec.PIPELINES)}")
    for component in spec.COMPONENTS:
        if component not in folder.components:
            raise CheckpointError(f"{name}: component {component} is missing; {family} needs it")
    if expected_hash is not None and folder.hash() != expected_hash:
        raise CheckpointError(f"{name}: checkpoint_hash is {folder.hash()}; the plan was made with {expected_hash}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m vidgen.engine PROMPT --out VIDEO.mp4`: one video, without Ray; a gang of processes by torchrun."""
    from vidgen import media
    from vidgen.formats import FORMATS

    parser = argparse.ArgumentParser(prog="python -m vidgen.engine", description="Generate one video.")
    parser.add_argument("prompt")
    parser.add_argument("--out", required=True, help="file to write; its ending chooses the format")
    parser.add_argument("--checkpoint", default="demo", help="demo, a folder, a hub id, or a URL of a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as published")
    parser.add_argument("--device", default="auto")
    for name, kind in (("seed", int), ("steps", int), ("guidance-scale", float), ("height", int), ("width", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--num-frames", type=int)
    for name in ("context", "ulysses", "ring", "cfg"):
        parser.add_argument(f"--{name}", type=int, help=f"parallel.{name}, of a gang that torchrun starts")
    given = parser.parse_args(argv)
    names = {"steps": "num_inference_steps"}
    options = ("seed", "steps", "guidance_scale", "height", "width", "num_frames")
    chosen = {names.get(name, name): value for name in options if (value := getattr(given, name)) is not None}
    try:
        format = _format(given.out, FORMATS)
        settings = ModelSettings(checkpoint=given.checkpoint, dtype=given.dtype, device=given.device)
        parallel = {name: getattr(given, name) for name in ("context", "ulysses", "ring", "cfg")}
        gang = _of_torchrun(settings, parallel)
        engine = load_model(settings, gang)
        request = engine.request(given.prompt, **chosen)
        for video in engine.generate([request]):
            if gang is not None and not gang.first:
                assert not list(video.chunks), "frames are rank 0's"
                continue
            written = media.write(video, given.out, format=format)
            print(f"{given.out}: {written.frames} frames, {written.bytes:,} bytes")
        if gang is not None:
            gang.close()
    except (ValueError, GenerationError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def _of_torchrun(settings: ModelSettings, parallel: Mapping[str, int | None]) -> Gang | None:
    """This process's place among those that torchrun started, as its environment says; None if it is alone."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 and not any(parallel.values()):
        return None
    configs = open_checkpoint(settings.checkpoint, settings.revision).configs()
    spec = families.spec(families.recognise(configs["model_index"]))
    mesh = layout(parallel, spec.heads(spec.read(configs)), int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    if mesh.size != processes:
        raise ConfigError(
            f"--context, --ulysses, --ring, --cfg ask for {mesh.size} processes, and there are {processes}; start them "
            f"with `torchrun --nproc-per-node {mesh.size} -m vidgen.engine ...`"
        )
    if mesh.size == 1:
        return None
    from vidgen.parallel.gang import join

    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    return join(
        int(os.environ["RANK"]),
        mesh,
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        device=gpu if settings.device == "auto" else settings.device,
        timeout=MEETING_SECONDS,
    )


def _format(out: str, formats: Mapping[str, Any]) -> str:
    """The format whose files end as `out` does."""
    for name, format in formats.items():
        if Path(out).suffix == format.extension:
            return name
    allowed = ", ".join(format.extension for format in formats.values())
    raise ConfigError(f"--out {out!r} must end in one of {allowed}")


if __name__ == "__main__":
    raise SystemExit(main())
