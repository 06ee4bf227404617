"""The attention kernels of this machine, beside the formula they compute."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def attention(arguments: argparse.Namespace) -> None:
    """The attention kernels of this GPU: the log-sum-exp that each returns, and what a gang of one costs (nothing)."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vidgen.nn.attention import attention as ours
    from vidgen.nn.attention import attention_with_lse, plain_attention_with_lse

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("attention: needs a CUDA GPU, and torch sees none (--device cpu measures the CPU's kernels)")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    print(f"torch {torch.__version__} on {name}, {str(dtype)[6:]}, {arguments.tokens:,} tokens; errors against fp32")
    print(f"{'kernel':20} {'heads x size':>12} {'lse off by':>11} {'result off by':>14} {'ms':>9}")
    for heads, size in ((12, 128), (24, 64), (5, 40)):
        draw = torch.Generator().manual_seed(0)
        shape = (1, arguments.tokens, heads, size)
        q, k, v = (torch.randn(shape, generator=draw).to(arguments.device, dtype) for _ in range(3))
        views = [x.transpose(1, 2) for x in (q, k, v)]
        plain, plain_lse = plain_attention_with_lse(*views)
        for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            chosen = getattr(SDPBackend, kernel)
            with sdpa_kernel(chosen):
                try:
                    taken = torch._fused_sdp_choice(*views)
                except RuntimeError:  # no kernel that is allowed here takes them
                    taken = None
                if taken != chosen.value:
                    print(f"{kernel:20} {heads:5} x {size:4} does not take these")
                    continue
                out, lse = attention_with_lse(q, k, v)
                seconds = _seconds(partial(attention_with_lse, q, k, v), arguments.repeats)
            off = float((lse.transpose(1, 2) - plain_lse).abs().max())
            worst = float((out.transpose(1, 2) - plain).abs().max())
            print(f"{kernel:20} {heads:5} x {size:4} {off:11.1e} {worst:14.1e} {seconds * 1e3:9.3f}")
        act = (partial(ours, q, k, v), partial(functional.scaled_dot_product_attention, *views))
        turns = [[_seconds(one, arguments.repeats) for one in act] for _ in range(3)]
        mine, direct = (min(turn[i] for turn in turns) for i in (0, 1))
        print(
            f"{'a gang of one':20} {heads:5} x {size:4} {mine * 1e3:.3f} ms, torch's own call {direct * 1e3:.3f} ms, "
            f"ratio {mine / direct:.3f}"
        )


def _seconds(act: Callable[[], Any], repeats: int) -> float:
    """Of one call, the device's queue included; the first two are not counted."""
    import torch

    def done() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(2):
        act()
    done()
    started = time.perf_counter()
    for _ in range(repeats):
        act()
    done()
    return (time.perf_counter() - started) / repeats
