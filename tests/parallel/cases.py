"""What is divided among gangs in this folder: the tiny checkpoints of every family and task, and the ways to divide."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.models.case import Case, cases
from tests.models.test_families import conditioning_media
from tests.models.wan import tiny_checkpoint as wan
from tests.parallel.ranks import ENGINES, loop_of
from vidgen.parallel.layout import Layout
from vidgen.types import Request

LAYOUTS = {
    "ulysses_2": Layout(ulysses=2),
    "ring_2": Layout(ring=2),
    "ring_4": Layout(ring=4),
    "ring_2_x_ulysses_2": Layout(ring=2, ulysses=2),
    "cfg_2": Layout(cfg=2),
    "cfg_2_x_ulysses_2": Layout(cfg=2, ulysses=2),
}
SHORT = (
    "wan/t2v",
    "wan/i2v",
    "wan/dense_i2v",
    "ltx/t2v-0.9.0",
    "ltx/i2v-0.9.5",
    "cogvideox/t2v-2b",
    "cogvideox/i2v-1.5-dpm",
    "hunyuan/t2v-true-cfg",
    "hunyuan/i2v-token-replace",
    "mochi/t2v",
    "allegro/t2v",
    "wan/5_heads",
)
"""The rest is slow."""
UNEVEN = {
    # Nothing divides anything: 5 heads, and 3 x 3 x 3 tokens or 5 x 3 x 2.
    "wan/5_heads": Case(
        "t2v",
        partial(wan._write, transformer={"num_attention_heads": 5}),
        {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 2},
    ),
}


def _with_heads(like: str, heads: int, **widths: int) -> Case:
    """A case of another family with so many heads, and what follows from that."""
    module = importlib.import_module(f"tests.models.{like.partition('/')[0]}.tiny_checkpoint")
    case = cases()[like]

    def write(folder: Path) -> None:
        with patch.dict(module.TRANSFORMER, {"num_attention_heads": heads, **widths}):
            case.write(folder)

    return replace(case, write=write)


FIVE_HEADS = {
    "wan/5_heads": UNEVEN["wan/5_heads"],
    "ltx/5_heads": _with_heads("ltx/i2v-0.9.5", 5, cross_attention_dim=80),
    "cogvideox/5_heads": _with_heads("cogvideox/t2v-2b", 5),
    "hunyuan/5_heads": _with_heads("hunyuan/t2v-true-cfg", 5),
    "mochi/5_heads": _with_heads("mochi/t2v", 5),
    "allegro/5_heads": _with_heads("allegro/t2v", 5, cross_attention_dim=60),
}
CASES = {**cases(), **UNEVEN, **FIVE_HEADS}


def requests(
    name: str, checkpoint: Path, media_folder: Path, seeds: tuple[int, ...] = (7,), **changes: Any
) -> list[Request]:
    """Requests for a case, one a seed, with the media it takes written to a folder."""
    case = CASES[name]
    loop_of(str(checkpoint), case.task, None)
    model = ENGINES[str(checkpoint), case.task]
    defaults = model.spec.defaults(case.task, model.params)
    values = {**case.sampling, **changes}
    prompts = (values.pop("prompt", "a red circle moving left"), "the green square and the cat or a dog")
    size = [values.get(key) or defaults[key] for key in ("num_frames", "height", "width")]
    takes = [field for field, needed in model.spec.TASKS[case.task].items() if needed or field in case.media]
    media = conditioning_media(takes, size, media_folder)
    return [model.request(prompts[i], **media | values, seed=seed) for i, seed in enumerate(seeds)]
