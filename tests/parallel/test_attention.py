"""Attention over a gang is attention: every way to divide it, every shape, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parallel.ranks import Shape, attended, bytes_sent, traffic_of
from tests.parallel.workers import Workers
from vidgen.nn import attention as module
from vidgen.nn.attention import (
    Merged,
    attention,
    attention_with_lse,
    joint_attention,
    plain_attention_with_lse,
)
from vidgen.parallel.layout import Layout, shares

EXACT = 1e-5
"""Of fp32 attention of values of about 2, scores of about 10: kernels sum in another order, and blocks are merged."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = {
    "ulysses_2": Layout(ulysses=2),
    "ring_2": Layout(ring=2),
    "ulysses_4": Layout(ulysses=4),
    "ring_4": Layout(ring=4),
    "ring_2_x_ulysses_2": Layout(ring=2, ulysses=2),
}
SHAPES = {
    "even": Shape(),
    "tokens_that_no_rank_count_divides": Shape(batch=2, tokens=13),
    "heads_that_no_rank_count_divides": Shape(heads=5, tokens=11, size=6),
    "fewer_tokens_than_ranks": Shape(tokens=3, heads=4),
    "one_token": Shape(tokens=1, heads=7),
    "text": Shape(text=5, tokens=9),
    "text_and_nothing_divides": Shape(batch=2, text=3, tokens=7, heads=5),
    "texts_of_two_lengths": Shape(batch=2, text=6, tokens=10, heads=6, lengths=(6, 2)),
    "one_short_text": Shape(text=6, tokens=5, heads=4, lengths=(4,)),
    "an_empty_text": Shape(batch=2, text=3, tokens=6, lengths=(3, 0)),
    "fewer_tokens_than_ranks_and_text": Shape(text=4, tokens=2),
}


def reference(shape: Shape) -> tuple[Tensor, ...]:
    """Softmax attention in float64, item by item."""
    video, text = shape.tensors()
    outs, texts = [], []
    for b in range(shape.batch):
        length = (shape.lengths[b] if shape.lengths else shape.text) or 0
        q, k, v = (torch.cat([x[b], t[b, :length]]).double().transpose(0, 1) for x, t in zip(video, text, strict=True))
        out = (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(shape.size), dim=-1) @ v).transpose(0, 1)
        outs.append(out[: shape.tokens])
        texts.append(torch.cat([out[shape.tokens :], out.new_zeros((shape.text or 0) - length, *out.shape[1:])]))
    return (torch.stack(outs),) if shape.text is None else (torch.stack(outs), torch.stack(texts))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_gets_what_one_alone_gets(layout: Layout, workers: Workers) -> None:
    for name, shape in SHAPES.items():
        if layout.ulysses > shape.heads:
            continue
        expected = reference(shape)
        for rank, found in enumerate(workers.run(layout, attended, shape)):
            for one, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(
                    one.double(), wanted, rtol=0, atol=EXACT, msg=lambda m, n=name, r=rank: f"{n}, rank {r}: {m}"
                )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_in_bfloat16_the_error_is_at_most_twice_that_of_one_rank(layout: Layout, workers: Workers) -> None:
    for text in (None, 40):
        shape = Shape(batch=1, tokens=301, heads=6, size=16, text=text, dtype="bfloat16")
        expected = torch.cat([x.flatten() for x in reference(shape)])
        (q, k, v), (tq, tk, tv) = shape.tensors()
        alone = joint_attention((q, k, v), (tq, tk, tv))
        error = float((torch.cat([x.flatten() for x in alone])[: len(expected)].double() - expected).square().mean())
        for found in workers.run(layout, attended, shape):
            together = torch.cat([x.flatten() for x in found]).double()
            assert float((together - expected).square().mean()) <= 4 * error, "mean squares: twice is four times"


def test_each_mode_sends_what_its_formula_says(workers: Workers) -> None:
    """The table of `vidgen.parallel.gang`, rank by rank, where nothing divides anything."""
    for layout in LAYOUTS.values():
        for shape in (Shape(batch=2, tokens=13, heads=5), Shape(tokens=13, heads=5, text=4)):
            ranks = workers.run(layout, traffic_of, shape)
            for rank, seen in enumerate(ranks):
                assert seen["tokens"] == shares(shape.tokens, layout.context)[rank]
                assert seen["tokens"] <= math.ceil(shape.tokens / layout.context)
                calls = {"all_to_all_single": 2} if layout.ulysses > 1 else {}
                calls |= {"batch_isend_irecv": layout.ring - 1} if layout.ring > 1 else {}
                assert seen["calls"] == calls, "and no all-gather"
                assert seen["sent"] == bytes_sent(layout, rank, shape)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 9),
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    heads=st.integers(1, 3),
    size=st.sampled_from([3, 8, 12]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_blocks_of_keys_merge_to_the_attention_of_all_of_them(
    batch: int, queries: int, blocks: list[int], heads: int, size: int, scale: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(batch, queries, heads, size, generator=draw)
    parts = [
        (
            scale * torch.randn(batch, count, heads, size, generator=draw),
            torch.randn(batch, count, heads, size, generator=draw),
        )
        for count in blocks
    ]
    merged = Merged(q)
    for k, v in parts:
        merged.add(k, v)
    k, v = (torch.cat(part, dim=1).double() for part in zip(*parts, strict=True))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k) / math.sqrt(size)
    expected = torch.einsum("bhnm,bmhd->bnhd", torch.softmax(scores, dim=-1), v)
    # Scores carry the rounding of their products into the exponent.
    products = torch.einsum("bnhd,bmhd->bhnm", q.double().abs(), k.abs()) / math.sqrt(size)
    allowed = 1e-6 * (1 + float(products.max()))
    torch.testing.assert_close(merged.result().double(), expected, rtol=0, atol=allowed)
    assert merged.lse is not None
    torch.testing.assert_close(
        merged.lse[..., 0].transpose(1, 2).double(), torch.logsumexp(scores, dim=-1), rtol=1e-6, atol=allowed
    )


class Circle:
    """A ring of one process: three blocks that arrive in turn, and what happens when."""

    size = ring = 3

    def __init__(self, blocks: list[tuple[Tensor, Tensor]]) -> None:
        self.blocks, self.events = blocks, []

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def own_heads(self, x: Tensor) -> Tensor:
        return x

    def to_tokens(self, x: Tensor, heads: int, whole: int = 0) -> Tensor:
        return x

    def pass_on(self, k: Tensor, v: Tensor, turn: int) -> Circle:
        assert torch.equal(k, self.blocks[turn][0]) and torch.equal(v, self.blocks[turn][1]), "the block in hand"
        self.events.append("sent")
        self.arriving = self.blocks[turn + 1]
        return self

    def wait(self) -> tuple[Tensor, Tensor]:
        self.events.append("here")
        return self.arriving


@pytest.mark.parametrize("text", [0, 4])
def test_the_next_block_is_on_its_way_while_the_one_in_hand_is_attended_to(
    text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v), words = Shape(tokens=9, text=text).tensors()
    circle = Circle([(k[:, i : i + 3], v[:, i : i + 3]) for i in (0, 3, 6)])

    def attending(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        circle.events.append("text" if k.shape[1] == 4 else "attended")
        return attention_with_lse(q, k, v)

    monkeypatch.setattr(module, "attention_with_lse", attending)
    own = (q, *circle.blocks[0])
    if text:
        joint_attention(own, (words[0], words[1], words[2]), cp=circle)  # type: ignore[arg-type]
    else:
        attention(*own, circle)  # type: ignore[arg-type]
    first = ["sent", "attended"] + ["text"] * (text > 0) + ["here"]
    assert circle.events == [*first, "sent", "attended", "here", "attended"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [12, 64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_and_the_plain_form_give_the_same_sums(device: str, size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, size, generator=draw).to(device, dtype) for n in (5, 9, 9))
    out, lse = attention_with_lse(q, k, v)
    plain, plain_lse = plain_attention_with_lse(*(x.transpose(1, 2) for x in (q, k, v)))
    assert lse.dtype == torch.float32 and out.dtype == dtype
    torch.testing.assert_close(lse.transpose(1, 2), plain_lse, rtol=1e-5, atol=1e-5)
    # The kernel rounds the weights to the dtype before it sums, the plain form only what comes out.
    torch.testing.assert_close(out.transpose(1, 2), plain, rtol=0, atol=max(EXACT, 4 * torch.finfo(dtype).eps))
