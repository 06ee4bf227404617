"""Our side: the loop over a family's pipeline, watched, and what is kept of it for the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vidgen.loop import Loop, State
from vidgen.parallel import ALONE, Ranks
from vidgen.parity.report import Report
from vidgen.parity.trace import Trace, a_step, now
from vidgen.sampling.step import Draws, Start
from vidgen.types import Hooks, Request


def run(loop: Loop, request: Request, report: Report) -> Trace:
    """Runs ours and records what it does."""
    pipeline, trace = loop.pipeline, Trace()
    begin, decode, encode_text = pipeline.begin, pipeline.decode, pipeline.encode_text
    frames: list[Tensor] = []
    trace.decode = decode

    def beginning(*args: Any) -> Start:
        trace.starts.append(begin(*args))
        return trace.starts[0]

    def decoding(latents: Tensor, request: Request, draws: Draws, ranks: Ranks) -> Iterator[Tensor]:
        trace.drawn = draws.state()
        for chunk in decode(latents, request, draws, ranks):
            frames.append(chunk.detach().float().cpu())
            yield chunk

    def encoding(prompts: Sequence[Any]) -> list[Any]:
        texts = encode_text(prompts)
        trace.texts += [text.embedding[: text.tokens].detach().float().cpu() for text in texts]
        return texts

    def stepped(state: State) -> None:
        trace.latents.append(state.latents.detach().float().cpu())
        trace.step_times.append(now(pipeline.device))

    for name, recording in (("begin", beginning), ("decode", decoding), ("encode_text", encoding)):
        setattr(pipeline, name, recording)
    begun = now(pipeline.device)
    for video in loop.generate([request], Hooks(save=stepped)):
        for _ in video.chunks:
            pass
        report.seconds |= {f"native {stage}": seconds for stage, seconds in video.seconds.items()}
    report.seconds["native total"] = now(pipeline.device) - begun
    report.seconds["native a step"] = a_step(trace.step_times)
    trace.frames = torch.cat(frames)
    return trace


def keep_the_vae(pipeline: Any) -> None:
    """Lets go of every other network, and of what they made for the next batch."""
    for name in [name for name in vars(pipeline) if name not in ("vae", "params", "device", "dtypes")]:
        if name not in ("begin", "decode", "encode_text"):
            setattr(pipeline, name, None)


def decoded(ours: Trace, latents: Tensor, request: Request) -> Tensor:
    """Frames of these latents, with the random numbers that the first decoding had."""
    assert ours.decode is not None and ours.drawn is not None
    draws = Draws([request.seed])
    draws.restore(ours.drawn)
    with torch.inference_mode():
        return torch.cat([chunk.float().cpu() for chunk in ours.decode(latents, request, draws, ALONE)])
