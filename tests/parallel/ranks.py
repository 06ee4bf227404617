"""What a rank does in the tests of this folder: functions of its gang, run in a process of its own."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen import engine
from vidgen.engine import Engine
from vidgen.errors import InfrastructureError, ItemError
from vidgen.loop import Loop, State
from vidgen.nn.attention import attention, joint_attention
from vidgen.parallel import ALONE
from vidgen.parallel.gang import Gang, Mesh
from vidgen.parallel.layout import Layout, shares
from vidgen.sampling.step import Draws
from vidgen.types import Hooks, ModelSettings, Request

ENGINES: dict[tuple[str, str], Engine] = {}
"""Models that this process has loaded, by checkpoint and task."""


@dataclass(frozen=True)
class Shape:
    """Of an attention: batch, tokens, heads, head size, text tokens (None: no text), and each item's true length."""

    batch: int = 1
    tokens: int = 12
    heads: int = 4
    size: int = 8
    text: int | None = None
    lengths: tuple[int, ...] | None = None
    dtype: str = "float32"

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Queries, keys and values of the whole clip, and of the text; the same in every process."""
        draw = torch.Generator().manual_seed(self.tokens + 100 * self.heads)

        def one(tokens: int) -> Tensor:
            wide = torch.randn(self.batch, tokens, self.heads, self.size, generator=draw, dtype=torch.float64)
            return (2 * wide).to(getattr(torch, self.dtype))

        return [one(self.tokens) for _ in range(3)], [one(self.text or 0) for _ in range(3)]


def attended(gang: Gang | None, shape: Shape) -> tuple[Tensor, ...]:
    """The attention of this shape, whole: (video,) or (video, text)."""
    assert gang is not None
    video, text = shape.tensors()
    cp = gang.context.over(shape.tokens)
    own = [cp.shard(x) for x in video]
    if shape.text is None:
        return (cp.gather(attention(own[0], own[1], own[2], cp)).clone(),)
    seen, read = joint_attention((own[0], own[1], own[2]), (text[0], text[1], text[2]), shape.lengths, cp)
    return cp.gather(seen).clone(), read.clone()


@dataclass
class Traffic:
    """What a rank has sent to others: calls of each collective, and bytes."""

    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Watches torch.distributed. A rank's piece to itself leaves no rank, and does not count."""
    traffic, kept = Traffic(), {}

    def watch(name: str, bytes_sent: Any) -> None:
        kept[name] = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            traffic.calls[name] += 1
            traffic.sent[name] += bytes_sent(*args, **kwargs)
            return kept[name](*args, **kwargs)

        setattr(dist, name, watched)

    def swapped(out: Tensor, sent: Tensor, coming: Sequence[int], leaving: Sequence[int], group: Any) -> int:
        own = dist.get_rank(group)
        return sum(part for rank, part in enumerate(leaving) if rank != own) * sent.element_size()

    watch("all_to_all_single", swapped)
    watch("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend))
    watch("all_gather", lambda out, own, group: own.nbytes)
    watch("broadcast", lambda x, src: x.nbytes)
    watch("all_reduce", lambda x, *args, **kwargs: x.nbytes)
    try:
        yield traffic
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def traffic_of(gang: Gang | None, shape: Shape) -> dict[str, Any]:
    """One attention's traffic, and how many tokens this rank had."""
    assert gang is not None
    video, text = shape.tensors()
    cp = gang.context.over(shape.tokens)
    q, k, v = (cp.shard(x) for x in video)
    with counted() as traffic:
        if shape.text is None:
            attention(q, k, v, cp)
        else:
            joint_attention((q, k, v), (text[0], text[1], text[2]), shape.lengths, cp)
    return {"calls": dict(traffic.calls), "sent": dict(traffic.sent), "tokens": q.shape[1]}


def bytes_sent(layout: Layout, rank: int, shape: Shape) -> dict[str, int]:
    """What leaves a rank in one attention, by collective: the table of `vidgen.parallel.gang`."""
    tokens = shares(shape.tokens, layout.context)
    blocks = [sum(tokens[first : first + layout.ulysses]) for first in range(0, len(tokens), layout.ulysses)]
    _, block, index = layout.place(rank)
    n, m, after = tokens[rank % layout.context], blocks[block], blocks[(block + 1) % layout.ring]
    g, text = shares(shape.heads, layout.ulysses)[index], shape.text or 0
    unit = shape.batch * shape.size * getattr(torch, shape.dtype).itemsize
    sent = {}
    if layout.ulysses > 1:
        sent["all_to_all_single"] = 3 * n * (shape.heads - g) * unit
        sent["all_to_all_single"] += (m - n + (layout.ulysses - 1) * text) * g * unit
    if layout.ring > 1:
        sent["batch_isend_irecv"] = 2 * (shape.tokens - after) * g * unit
    return sent


@dataclass
class Made:
    """What a rank made of a batch: each prediction of its first step, latents before decoding [B, ...], and each
    video's frames [F, H, W, 3] in [0, 1], None where it had none; what the first video says of itself."""

    predictions: list[Tensor]
    latents: Tensor
    frames: list[Tensor | None]
    context: int
    counts: dict[str, int]
    encoded: int
    decoded_by_vae: int


def loop_of(checkpoint: str, task: str, gang: Gang | None) -> Loop:
    """The loop of a checkpoint, loaded once, for this gang."""
    if (checkpoint, task) not in ENGINES:
        ENGINES[checkpoint, task] = engine.load_model(ModelSettings(checkpoint=checkpoint, task=task), gang)
    loop = ENGINES[checkpoint, task].backend
    assert isinstance(loop, Loop)
    loop.ranks = ALONE if gang is None else gang
    return loop


def encoders(gang: Gang | None, checkpoint: str, task: str) -> set[str]:
    """The networks of transformers that live anywhere in this process once it has loaded the checkpoint for the gang,
    by their classes."""
    loop_of(checkpoint, task, gang)
    kinds = {type(found) for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)}
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("transformers.models.")}


def first_layer(network: torch.nn.Module) -> torch.nn.Module:
    return next(
        layer for layer in network.modules() if isinstance(layer, torch.nn.Conv3d) or not list(layer.children())
    )


def generated(gang: Gang | None, checkpoint: str, task: str, requests: list[Request]) -> Made:
    """Runs a batch, and tells what happened inside."""
    loop = loop_of(checkpoint, task, gang)
    pipeline: Any = loop.pipeline
    predictions: list[Tensor] = []
    latents: list[Tensor] = []
    encoded: list[Any] = []
    chunks: list[list[Tensor]] = []
    tiles: list[Any] = []
    predict, encode_text, decode = pipeline.predict, pipeline.encode_text, pipeline.decode

    def predicting(x: Tensor, schedule: Any, i: int, *rest: Any) -> Tensor:
        found: Tensor = predict(x, schedule, i, *rest)
        if i == 0:
            predictions.append(found.float().clone())
        return found

    def encoding(prompts: Any) -> Any:
        encoded.extend(prompts)
        return encode_text(prompts)

    def decoding(x: Tensor, *rest: Any) -> Iterator[Tensor]:
        latents.append(x.clone())
        chunks.append([])
        for chunk in decode(x, *rest):
            chunks[-1].append(chunk.float().clone())
            yield chunk

    hook = first_layer(pipeline.vae.decoder).register_forward_pre_hook(lambda module, args: tiles.append(None))
    pipeline.predict, pipeline.encode_text, pipeline.decode = predicting, encoding, decoding
    loop._texts.clear()
    try:
        videos = []
        for video in loop.generate(requests, Hooks()):
            shown = list(video.chunks)
            assert bool(shown) == (gang is None or gang.first), "frames are rank 0's, and nobody else's"
            videos.append(video)
    finally:
        hook.remove()
        del pipeline.predict, pipeline.encode_text, pipeline.decode
    frames = [torch.cat(own) if own else None for own in chunks]
    return Made(predictions, torch.cat(latents), frames, videos[0].context, videos[0].counts, len(encoded), len(tiles))


def decoded(gang: Gang | None, checkpoint: str, task: str, request: Request) -> tuple[list[Tensor], int]:
    """Random latents of the request's size, decoded: the chunks, and how often this rank's decoder ran."""
    loop, ran = loop_of(checkpoint, task, gang), []
    pipeline: Any = loop.pipeline
    hook = first_layer(pipeline.vae.decoder).register_forward_pre_hook(lambda module, args: ran.append(None))
    try:
        with torch.inference_mode():
            begun, schedule = Loop(pipeline, loop.batch_key), pipeline.schedule(request)
            start = loop.ranks.agree(lambda: begun._begun([request], schedule, Draws([request.seed]), Hooks())[0])
            chunks = pipeline.decode(start.latents, request, Draws([3]), loop.ranks)
            return [chunk.clone() for chunk in chunks], len(ran)
    finally:
        hook.remove()


def inside(gang: Gang | None, checkpoint: str, task: str, request: Request) -> dict[str, Any]:
    """What one forward does: the most tokens that a block was given, the share of them it may have, the traffic, and
    how many blocks of keys and values lived at once while they went round."""
    assert gang is not None
    loop = loop_of(checkpoint, task, gang)
    pipeline: Any = loop.pipeline
    seen: list[tuple[int, int]] = []
    alive: list[int] = []
    known: list[Any] = []
    shapes: list[Shape] = []

    def returning(mesh: Mesh, x: Tensor, heads: int, whole: int = 0) -> Tensor:
        assert mesh.tokens is not None
        shapes.append(Shape(x.shape[0], mesh.tokens, heads, x.shape[3], whole or None, None, str(x.dtype)[6:]))
        return to_tokens(mesh, x, heads, whole)

    def entered(module: Any, args: tuple[Any, ...]) -> None:
        mesh = next(arg for arg in args if isinstance(arg, Mesh))
        assert mesh.tokens is not None
        seen.append((args[0].shape[1], -(-mesh.tokens // mesh.size)))

    def passing(mesh: Mesh, k: Tensor, v: Tensor, turn: int) -> Any:
        handover = pass_on(mesh, k, v, turn)
        if turn == 0:
            known.clear()
        known.extend(weakref.ref(x) for x in ((k, v) if turn == 0 else ()))
        known.extend(weakref.ref(x) for x in handover.arriving)
        alive.append(sum(ref() is not None for ref in known))
        return handover

    pass_on, to_tokens = Mesh.pass_on, Mesh.to_tokens
    blocks = [
        block
        for name, layers in pipeline.transformer.named_children()
        if name in ("blocks", "transformer_blocks", "single_transformer_blocks")
        for block in layers.children()
    ]
    hooks = [block.register_forward_pre_hook(entered) for block in blocks]
    Mesh.pass_on, Mesh.to_tokens = passing, returning  # type: ignore[method-assign]
    try:
        with torch.inference_mode():
            schedule = pipeline.schedule(request)
            begun = Loop(pipeline, loop.batch_key)
            start = gang.agree(lambda: begun._begun([request], schedule, Draws([request.seed]), Hooks())[0])
            with counted() as traffic:
                pipeline.predict(start.latents, schedule, 0, start.conditioning["conditional"], gang.context)
    finally:
        Mesh.pass_on, Mesh.to_tokens = pass_on, to_tokens  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
    return {
        "tokens": seen,
        "calls": dict(traffic.calls),
        "sent": dict(traffic.sent),
        "shapes": shapes,
        "blocks": len(blocks),
        "alive": max(alive, default=0),
    }


def disturbed(gang: Gang | None, checkpoint: str, task: str, request: Request, how: str) -> tuple[str, int, int]:
    """A batch that does not end well, or is saved: (the error's type and words, progress calls, states offered)."""
    assert gang is not None
    loop = loop_of(checkpoint, task, gang)
    pipeline: Any = loop.pipeline
    told: list[Any] = []
    saved: list[Any] = []
    hooks = Hooks(progress=lambda *args: told.append(args))
    if gang.first:
        if how == "cancelled":
            hooks.cancelled = lambda: len(saved) == 1
        hooks.save = saved.append
    if how == "refused" and gang.first:
        hooks.resume = lambda requests: (_ for _ in ()).throw(ItemError("a picture that nobody can read"))
    if how == "unreachable" and gang.first:
        hooks.resume = lambda requests: (_ for _ in ()).throw(InfrastructureError("s3://states cannot be reached"))
    if how == "disk_full" and gang.first:

        def full(state: Any) -> None:
            raise OSError(28, "No space left on device")

        hooks.save = full
    if how == "not_finite":
        pipeline.predict = lambda x, *rest: torch.full_like(x, float("nan"))
    try:
        for video in loop.generate([request], hooks):
            assert bool(list(video.chunks)) == gang.first
        return "", len(told), len(saved)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(told), len(saved)
    finally:
        pipeline.__dict__.pop("predict", None)


def saved_states(gang: Gang | None, checkpoint: str, task: str, request: Request) -> list[bytes]:
    """The states that rank 0 is offered."""
    states: list[bytes] = []
    hooks = Hooks(save=lambda state: states.append(state.to_bytes()))
    for video in loop_of(checkpoint, task, gang).generate([request], hooks):
        list(video.chunks)
    return states


def resumed(gang: Gang | None, checkpoint: str, task: str, request: Request, state: bytes) -> list[bytes]:
    """The states that are offered from a saved one on, which rank 0 alone has."""
    states: list[bytes] = []
    hooks = Hooks(save=lambda one: states.append(one.to_bytes()))
    if gang is None or gang.first:
        hooks.resume = lambda requests: State.from_bytes(state)
    for video in loop_of(checkpoint, task, gang).generate([request], hooks):
        list(video.chunks)
    return states


def sent_round(gang: Gang | None, value: Any) -> Any:
    """What every rank gets of rank 0's value."""
    assert gang is not None
    return gang.broadcast(value if gang.first else None)
