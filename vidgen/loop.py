"""The loop over denoising steps, for every native family; its state, and the batches it runs on.

Refuses to know any model (a family's `pipeline.py` has it), where weights come from, and what becomes of the frames.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch

from vidgen.conditioning import Conditioning
from vidgen.conditioning import read as read_media
from vidgen.device import memory_errors
from vidgen.errors import Cancelled, ItemError
from vidgen.parallel import ALONE, ContextParallel, Ranks
from vidgen.residency import Residency
from vidgen.sampling.step import Draws, Guidance, History, Sampler, Schedule, Start, guide
from vidgen.types import Hooks, Request, Video

if TYPE_CHECKING:
    from vidgen.text.prompt import Prompt, Text

TEXT_CACHE_BYTES = 128 * 2**20
"""Encoded prompts that an engine keeps, the least recently used going first."""


class Pipeline(Protocol):
    """What a native family's `pipeline.py` offers. All requests of one call share a batch key."""

    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    """The dtype of each component with weights."""

    def texts(self, request: Request, media: Conditioning) -> dict[str, Prompt]:
        """The prompt of each branch of the guidance."""

    def encode_text(self, prompts: Sequence[Prompt]) -> list[Text]:
        """Embeddings of each prompt, independent of the others."""

    def schedule(self, request: Request) -> Schedule:
        """Noise levels, from sizes and settings alone."""

    def begin(
        self,
        requests: Sequence[Request],
        media: Sequence[Conditioning],
        texts: Mapping[str, Sequence[Text]],
        schedule: Schedule,
        draws: Draws,
    ) -> Start:
        """Latents and conditioning of a batch, drawing random numbers in the family's order."""

    def guidance(self, request: Request, schedule: Schedule, i: int) -> Guidance:
        """How step i of one request is guided; pure."""

    def predict(
        self, x: torch.Tensor, schedule: Schedule, i: int, conditioning: Any, cp: ContextParallel
    ) -> torch.Tensor:
        """One branch, one forward; full latents in and out."""

    def sampler(self, request: Request, schedule: Schedule) -> Sampler:
        """The step function."""

    def decode(self, latents: torch.Tensor, request: Request, draws: Draws, ranks: Ranks) -> Iterator[torch.Tensor]:
        """Latents [1, ...] of one item -> frames [n, height, width, 3] in [0, 1] as they come, at rank 0; `draws` are
        the item's own, where denoising left them. Other ranks decode their tiles, if there are any, and yield nothing.
        """


@dataclass(frozen=True, slots=True)
class State:
    """All that the loop knows after `step` steps of a batch of B: latents [B, ...] fp32, what the sampler remembers,
    and the state of each item's generator, uint8 [B, n]. Continuing from it gives the same bits as not stopping."""

    step: int
    latents: torch.Tensor
    history: History
    generators: torch.Tensor

    def to_bytes(self, about: Mapping[str, str] | None = None) -> bytes:
        """The whole state as one safetensors file; `about` is what its header says of it."""
        tensors = {"step": torch.tensor(self.step), "latents": self.latents, "generators": self.generators}
        tensors |= {f"history.{name}": value for name, value in self.history.items()}
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return safetensors.torch.save(whole, dict(about) if about is not None else None)

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """Reads what `to_bytes` wrote; ValueError if it is anything else."""
        try:
            tensors = safetensors.torch.load(content)
            history = {key.removeprefix("history."): tensors[key] for key in tensors if key.startswith("history.")}
            return cls(int(tensors["step"]), tensors["latents"], history, tensors["generators"])
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"not a saved state of the denoising loop: {error}") from error

    @classmethod
    def together(cls, states: Sequence[State]) -> State:
        """States at one step, whose samplers remember the same, as one batch."""
        first = states[0]
        assert all(s.step == first.step and s.history.keys() == first.history.keys() for s in states), "mixed states"
        history = {name: torch.cat([s.history[name] for s in states]) for name in first.history}
        latents, generators = ([getattr(s, name) for s in states] for name in ("latents", "generators"))
        return cls(first.step, torch.cat(latents), history, torch.cat(generators))

    def item(self, b: int) -> State:
        """The state of one item of the batch, as a batch of one."""
        row = slice(b, b + 1)
        history = {name: value[row] for name, value in self.history.items()}
        return State(self.step, self.latents[row], history, self.generators[row])

    def finite(self) -> bool:
        """Whether no latent is NaN or infinite."""
        return all(bool(torch.isfinite(value).all()) for value in (self.latents, *self.history.values()))


@torch.inference_mode()
def denoise(
    pipeline: Pipeline,
    requests: Sequence[Request],
    schedule: Schedule,
    start: Start,
    state: State,
    draws: Draws,
    hooks: Hooks,
    ranks: Ranks = ALONE,
) -> tuple[torch.Tensor, Counter[str]]:
    """Steps `state` to the end of the schedule; returns the latents [B, ...] and the forwards of each branch.

    Raises Cancelled between two steps when asked to, and ItemError when latents stop being finite. Of a gang, rank 0
    alone is asked, and saves; all ranks go on, or stop, together.
    """
    sampler = pipeline.sampler(requests[0], schedule)
    x, history = state.latents, state.history
    forwards: Counter[str] = Counter()
    for i in range(state.step, schedule.steps):
        if ranks.agree(lambda: bool(hooks.cancelled())):
            raise Cancelled(f"before step {i + 1} of {schedule.steps}")
        x = start.pinned(x)
        guidances = [pipeline.guidance(request, schedule, i) for request in requests]
        branches = guidances[0].branches
        assert all(g.branches == branches and g.expert == guidances[0].expert for g in guidances), "mixed batch"
        predict = partial(_predicted, pipeline, x, schedule, i, start, ranks.context)
        predictions = ranks.predictions(branches, predict)
        forwards.update(branches)
        scale = torch.tensor([g.scale for g in guidances], dtype=torch.float32, device=x.device)
        rescale = torch.tensor([g.rescale for g in guidances], dtype=torch.float32, device=x.device)
        guided = guide(predictions[0], predictions[1] if len(branches) > 1 else None, scale, rescale)
        x, history = sampler(x, guided, i, history, draws)
        _check_finite(x, requests, f"latents after step {i + 1} of {schedule.steps}")
        hooks.progress("denoise", i + 1, schedule.steps)
        ranks.agree(partial(_offered, hooks, i + 1, x, history, draws))
    return start.pinned(x), forwards


def _predicted(
    pipeline: Pipeline,
    x: torch.Tensor,
    schedule: Schedule,
    i: int,
    start: Start,
    cp: ContextParallel,
    branch: str,
) -> torch.Tensor:
    return pipeline.predict(x, schedule, i, start.conditioning[branch], cp)


def _offered(hooks: Hooks, step: int, x: torch.Tensor, history: History, draws: Draws) -> None:
    if hooks.save is not None:
        hooks.save(State(step, x, history, draws.state()))


def groups(
    requests: Sequence[Request], key: Callable[[Request], str], limit: int | None
) -> Iterator[tuple[Request, ...]]:
    """Consecutive requests of equal batch key, at most `limit` together (None: no limit)."""
    for _, alike in itertools.groupby(requests, key):
        together = tuple(alike)
        size = len(together) if limit is None else limit
        for first in range(0, len(together), size):
            yield together[first : first + size]


class Loop:
    """A family's pipeline, run: batches of requests in, videos out. Keeps encoded prompts between calls. With `offload`
    each component is on the device only while it works.

    Each rank of a gang has a loop, and gets the same requests. Rank 0 alone reads media, encodes and begins; all have
    the same latents; rank 0 alone has frames, and the others take part in their making by reading their empty chunks.
    """

    def __init__(
        self, pipeline: Pipeline, batch_key: Callable[[Request], str], ranks: Ranks = ALONE, offload: bool = False
    ) -> None:
        self.pipeline, self.batch_key, self.ranks, self.offload = pipeline, batch_key, ranks, offload
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self.residency = Residency(pipeline, pipeline.device)
        self._spare(())

    def generate(self, requests: Sequence[Request], hooks: Hooks, batch: int | None = None) -> Iterator[Video]:
        """One video a request, in order. Consecutive requests of one batch key, at most `batch` (None: all of them),
        take one forward a step and branch together. A video's chunks are decoded as they are read."""
        for group in groups(requests, self.batch_key, batch):
            yield from self._batch(group, hooks)

    def _spare(self, rungs: Sequence[str]) -> None:
        """Frees what the rungs of the memory ladder say: what is kept between batches; components that do not work."""
        if "caches" in rungs:
            self._texts.clear()
            forget = getattr(self.pipeline, "forget", None)
            if forget is not None:
                forget()
        sparing = self.offload or "offload" in rungs
        if sparing != self.residency.sparing:
            self.residency.spare() if sparing else self.residency.settle()
        if rungs:
            gc.collect()
            if self.pipeline.device.type == "cuda":
                torch.cuda.empty_cache()

    def _batch(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        with memory_errors(self.pipeline.device, f"a batch of {len(requests)}: {_shape(requests[0])}"):
            latents, draws, seconds, counts = self._denoised(requests, hooks)
        for b, request in enumerate(requests):
            video = Video(
                request=request,
                chunks=iter(()),
                dtype=_dtype_label(self.pipeline.dtypes),
                batch=len(requests),
                context=self.ranks.context.size,
                seconds=dict(seconds),
                counts=dict(counts),
            )
            video.chunks = self._frames(latents[b : b + 1], draws.item(b), video, hooks)
            yield video

    @torch.inference_mode()
    def _denoised(
        self, requests: Sequence[Request], hooks: Hooks
    ) -> tuple[torch.Tensor, Draws, dict[str, float], dict[str, int]]:
        clock = _Clock(self.pipeline.device)
        hooks.progress("encode", 0, 1)
        if self.ranks.rank == 0:
            self._spare(hooks.rungs)
        schedule = self.pipeline.schedule(requests[0])
        draws = Draws([request.seed for request in requests])
        start, state, encoded, rungs = self.ranks.agree(lambda: self._begun(requests, schedule, draws, hooks))
        if self.ranks.rank != 0:
            self._spare(rungs)
        draws.restore(state.generators)
        hooks.progress("encode", 1, 1)
        seconds = {"encode": clock.lap()}
        latents, forwards = denoise(self.pipeline, requests, schedule, start, state, draws, hooks, self.ranks)
        seconds["denoise"] = clock.lap()
        counts = {f"{branch}_forwards": count for branch, count in forwards.items()}
        return latents, draws, seconds, {**counts, "text_encodes": encoded}

    def _begun(
        self, requests: Sequence[Request], schedule: Schedule, draws: Draws, hooks: Hooks
    ) -> tuple[Start, State, int, tuple[str, ...]]:
        """Where the batch begins, where to go on from, how many prompts were encoded for it, and how sparing all ranks
        are to be."""
        media = [read_media(request) for request in requests]
        texts, encoded = self._encode(requests, media)
        start = self.pipeline.begin(requests, media, texts, schedule, draws)
        return start, self._resumed(requests, start, schedule, draws, hooks), encoded, hooks.rungs

    def _encode(self, requests: Sequence[Request], media: Sequence[Conditioning]) -> tuple[dict[str, list[Text]], int]:
        """Encoded prompts of each branch, one a request, and how many were not in the cache."""
        prompts = [self.pipeline.texts(request, own) for request, own in zip(requests, media, strict=True)]
        wanted = {prompt.digest: prompt for branches in prompts for prompt in branches.values()}
        known = {digest: self._texts[digest] for digest in wanted if digest in self._texts}
        new = self.pipeline.encode_text([prompt for digest, prompt in wanted.items() if digest not in known])
        known |= {text.digest: text for text in new}
        for digest, text in known.items():
            self._texts[digest] = text
            self._texts.move_to_end(digest)
        while sum(t.embedding.nbytes for t in self._texts.values()) > TEXT_CACHE_BYTES and len(self._texts) > 1:
            self._texts.popitem(last=False)
        texts = {branch: [known[p[branch].digest] for p in prompts] for branch in prompts[0]}
        return texts, len(new)

    def _resumed(
        self, requests: Sequence[Request], start: Start, schedule: Schedule, draws: Draws, hooks: Hooks
    ) -> State:
        """A state to continue from, if the hook has one that is finite, else the start. ValueError if it is of other
        requests: another shape, more steps than the schedule has."""
        saved = hooks.resume(requests)
        if saved is None or not saved.finite():
            return State(0, start.latents, {}, draws.state())
        if saved.latents.shape != start.latents.shape or saved.step > schedule.steps:
            raise ValueError(
                f"the saved state has latents {list(saved.latents.shape)} after step {saved.step}; this batch has "
                f"{list(start.latents.shape)} and {schedule.steps} steps"
            )
        device = start.latents.device
        history = {name: value.to(device) for name, value in saved.history.items()}
        return State(saved.step, saved.latents.to(device), history, saved.generators)

    @torch.inference_mode()
    def _frames(self, latents: torch.Tensor, draws: Draws, video: Video, hooks: Hooks) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, 3] chunks of one item; none but at rank 0."""
        clock, done, request = _Clock(self.pipeline.device), 0, video.request
        video.seconds["decode"] = 0.0
        with memory_errors(self.pipeline.device, f"decoding {_shape(request)}"):
            chunks = self.pipeline.decode(latents, request, draws, self.ranks)
            try:
                for chunk in chunks:
                    _check_finite(chunk[None], [request], "decoded frames")
                    frames = (chunk * 255).round().to(torch.uint8).cpu().numpy()
                    done += len(frames)
                    video.seconds["decode"] += clock.lap()
                    hooks.progress("decode", done, request.num_frames)
                    yield frames
                    clock.lap()
            finally:
                if self.ranks.size > 1:
                    for _ in chunks:  # the others are in the middle of their tiles
                        pass


class _Clock:
    """Seconds between laps, the device's queue included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed


def _check_finite(values: torch.Tensor, requests: Sequence[Request], what: str) -> None:
    """ItemError naming the requests whose row of `values` [B, ...] holds NaN or infinity."""
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    if not all(finite):
        bad = [f"seed {r.seed}, {r.prompt[:80]!r}" for r, fine in zip(requests, finite, strict=True) if not fine]
        raise ItemError(f"{what} are not finite: {'; '.join(bad)}")


def _shape(request: Request) -> str:
    return f"{request.num_frames} frames of {request.width} x {request.height}"


def _dtype_label(dtypes: Mapping[str, torch.dtype]) -> str:
    """One name if all components agree, else each with its own."""
    names = {component: str(dtype).removeprefix("torch.") for component, dtype in dtypes.items()}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{component} {name}" for component, name in sorted(names.items()))
