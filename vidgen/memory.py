"""What fits where, as arithmetic: the memory that a request takes of a GPU, and the seconds that it takes there.

No measurement and no torch: sizes of a checkpoint in, bytes out, each as a named term with its formula. A family's
`footprint.py` has its numbers; this module knows dtypes, gangs, offload and GPUs. Refuses to know rows, configurations
and clusters.

The formulas were fitted to counts: all tensors alive at the fullest moment, plus, during a 3D convolution in half
precision, its input and output once more, which cuDNN lays out anew. Counted so, diffusers' own networks give the
figures that its authors measured (Hugging Face blog, "State of open video generation models in Diffusers", 2025: 512 x
768, 121 frames) within half a percent. Those figures are GiB, and so are the ones said here; GPUs are sold in GB.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vidgen.family import Spec
from vidgen.parallel.layout import Layout
from vidgen.specs.config import DTYPE_BYTES
from vidgen.specs.footprint import Footprint, tiles
from vidgen.specs.gpus import Gpu
from vidgen.types import Request

GIB = 2**30
CONTEXT_BYTES = GIB
"""Of a GPU's memory before the first tensor: the CUDA context, handles and workspaces of its libraries and of NCCL."""
FRAGMENTATION = 0.03
"""Of what is left: lost between the allocator's blocks, assumed."""
EFFICIENCY = 344.0 / 989.5
"""Of a data sheet's dense bf16 operations that reach the transformer: eager diffusers on an H100 (Wan 2.1 14B at 480 x
832 x 81, 9.77 s a step, is 344 TFLOP/s; the best exact engines reach 550 to 600). Assumed of every GPU."""
EIGHT = 0.64
"""What eight GPUs on one clip do of eight times one: engines publish 86, 64, 41 and 31 %; each doubling costs the same
share of it."""
TEXT_BYTES = GIB // 4
"""Activations of text and image encoders over one prompt, assumed."""
QUANTIZED: Mapping[str, float] = {"bitsandbytes_8bit": 1.15, "bitsandbytes_4bit": 9 / 16, "torchao": 1.0}
"""Bytes a number of a quantized component: 4 bits with an fp32 scale every 64; 8 bits as the published figures have it
(49.9 GiB for 60.1), with what stays unquantized; torchao's weight-only 8 bits."""
PINNED = ("bitsandbytes_8bit",)
"""Quantizations whose component cannot leave the GPU: offload does not move it."""
SOLVER_COPIES = 6
"""Latents in fp32 at a step: the latents, two predictions, the guided one, and two that a solver remembers."""
FRAME_COPIES = 4
"""A chunk's frames in fp32: decoded, joined, scaled and checked."""

PHASES: Mapping[str, tuple[str, ...]] = {
    "encode": ("text_encoder", "image_encoder"),
    "denoise": ("transformer", "unet", "controlnet"),
    "decode": ("vae",),
}
"""The stages of an item, and how the names of the components begin that each runs."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of what is needed: its bytes, and the formula they come from."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class Need:
    """The memory of one rank, by stage; `whole` is false where only the weights are known."""

    stages: Mapping[str, tuple[Term, ...]]
    whole: bool = True

    @property
    def fullest(self) -> str:
        """The stage that needs the most."""
        return max(self.stages, key=self.of)

    def of(self, stage: str) -> int:
        return sum(term.bytes for term in self.stages[stage])

    @property
    def bytes(self) -> int:
        return self.of(self.fullest)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Those of the fullest stage, the largest first."""
        return tuple(sorted(self.stages[self.fullest], key=lambda term: -term.bytes))


@dataclass(frozen=True, slots=True)
class Component:
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Sizing:
    """A checkpoint as it will be loaded. `footprint` is None for a backend whose networks are not ours to count."""

    components: Mapping[str, Component]
    footprint: Callable[[Request], Footprint] | None
    item_bytes: Mapping[str, int]
    offload: str = "none"
    pinned: tuple[str, ...] = ()

    def need(self, request: Request, mesh: Layout, footprint: Footprint | None = None) -> Need:
        """What one rank of the mesh needs to make one item (a batch of one: what an engine falls back to)."""
        stages = {stage: [self._weights(stage)] for stage in PHASES}
        stages["encode"].append(Term("encoder activations", TEXT_BYTES, "assumed, one prompt"))
        if self.footprint is None:
            return Need({stage: tuple(terms) for stage, terms in stages.items()}, whole=False)
        f = footprint or self.footprint(request)
        kept = self._kept(f)
        stages["denoise"] += [self._activations(f, mesh), *self._buffers(f, mesh), kept, self._latents(f)]
        stages["decode"] += [*self._decoder(f, request, mesh), kept]
        return Need({stage: tuple(term for term in terms if term.bytes) for stage, terms in stages.items()})

    def _weights(self, stage: str) -> Term:
        """All of them without offload; with `model` the largest component of the stage; with `sequential` a layer at a
        time, counted as none."""
        sizes = {name: component.bytes for name, component in self.components.items()}
        if self.offload == "none":
            return Term("weights", sum(sizes.values()), " + ".join(f"{n} {gib(b)}" for n, b in sizes.items()))
        stay = sum(sizes[name] for name in self.pinned)
        if self.offload == "sequential":
            return Term("weights", stay, "a layer at a time")
        here = {n: b for n, b in sizes.items() if n.startswith(PHASES[stage]) and n not in self.pinned}
        moved = max(here.values(), default=0)
        return Term(
            "weights", stay + moved, f"offload: the largest of {', '.join(here) or 'none'}, and what cannot move"
        )

    def _activations(self, f: Footprint, mesh: Layout) -> Term:
        rows, item = -(-f.tokens // mesh.context) + f.text, self.item_bytes["denoise"]
        formula = f"({f.tokens:,} tokens / {mesh.context} + {f.text} of text) x {f.token:,.0f} numbers x {item} bytes"
        return Term("activations of a forward", int(rows * f.token * item), formula)

    def _buffers(self, f: Footprint, mesh: Layout) -> list[Term]:
        rows, item = -(-f.tokens // mesh.context) + f.text, self.item_bytes["denoise"]
        found = []
        if mesh.ulysses > 1:
            formula = f"all-to-all: queries, keys, values, result x {rows:,} tokens x {f.width} x {item} bytes"
            found.append(Term("exchange of heads", 4 * rows * f.width * item, formula))
        if mesh.ring > 1:
            formula = f"keys and values in hand and under way, the sum in fp32, x {rows:,} tokens x {f.width}"
            found.append(Term("ring", rows * f.width * (4 * item + 4), formula))
        return found

    def _kept(self, f: Footprint) -> Term:
        item = self.item_bytes["denoise"]
        formula = f"{f.kept:,} numbers a prompt x {f.branches} branches x {item} bytes"
        return Term("text made once a prompt", f.kept * f.branches * item, formula)

    def _latents(self, f: Footprint) -> Term:
        return Term("latents", SOLVER_COPIES * f.latents * 4, f"{SOLVER_COPIES} x {f.latents:,} numbers x 4 bytes")

    def _decoder(self, f: Footprint, request: Request, mesh: Layout) -> list[Term]:
        """A gang divides tiles, the first rank puts their frames together; a picture in one piece is the first's."""
        item, cut = self.item_bytes["decode"], tiles(request.height, request.width, request.tiling)
        share = -(-cut.count // min(cut.count, mesh.size)) / cut.count
        where = "the picture" if cut.count == 1 else f"a tile of {cut.count}"
        frames = FRAME_COPIES * 3 * f.frames * cut.total * 4
        return [
            Term(
                f"decoding {where}",
                int(cut.largest * f.work * item),
                f"{cut.largest:,} pixels x {f.work:,.0f} numbers x {item} bytes, convolutions' buffers included",
            ),
            Term(
                "decoder between chunks",
                int(cut.total * share * f.held * item),
                f"{cut.total:,} pixels of all tiles x {share:.3g} x {f.held:,.0f} numbers x {item} bytes",
            ),
            Term("frames", frames, f"{FRAME_COPIES} x 3 x {f.frames} frames x {cut.total:,} pixels x 4 bytes"),
        ]


def sizing(
    family: str,
    spec: Spec,
    params: Any,
    *,
    dtype: str | None = None,
    offload: str = "none",
    quantization: str | None = None,
) -> Sizing | None:
    """The sizing of a checkpoint in the dtype, or where that is None the dtypes, it is loaded in; None for a family
    without weights, or without a `footprint.py`."""
    name = f"vidgen.models.{family}.footprint"
    if not spec.CHECKPOINT or importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    own = getattr(module, "components", None)
    found = own(params) if own is not None else _components(spec, params)
    chosen = {component: dtype or published for component, (_, published) in found.items()}
    sizes = {component: numbers * DTYPE_BYTES[chosen[component]] for component, (numbers, _) in found.items()}
    small: tuple[str, ...] = ()
    if quantization is not None and quantization in QUANTIZED:
        small = module.quantized(params) if hasattr(module, "quantized") else ("transformer",)
        sizes |= {name: int(found[name][0] * QUANTIZED[quantization]) for name in small if name in found}
    counts = getattr(module, "footprint_of", None)
    return Sizing(
        components={name: Component(numbers, sizes[name]) for name, (numbers, _) in found.items()},
        footprint=None if counts is None else lambda request: counts(request, params),
        item_bytes={
            stage: max((DTYPE_BYTES[chosen[name]] for name in found if name.startswith(begins)), default=2)
            for stage, begins in PHASES.items()
        },
        offload=offload,
        pinned=small if quantization in PINNED else (),
    )


def _components(spec: Spec, params: Any) -> dict[str, tuple[int, str]]:
    """(numbers, published dtype) of each component: a family counts bytes in the dtypes of `params.dtypes`, so two
    more bytes a number of one component are twice its numbers more."""
    names = [name for name, _ in params.dtypes]

    def weighed(wide: str | None) -> int:
        dtypes = tuple((name, "float32" if name == wide else "float16") for name in names)
        return spec.weight_bytes(replace(params, dtypes=dtypes))

    half = weighed(None)
    return {name: ((weighed(name) - half) // 2, published) for name, published in params.dtypes}


def usable(gpu: Gpu) -> int:
    """Bytes for tensors."""
    return int((gpu.memory - CONTEXT_BYTES) * (1 - FRAGMENTATION))


def context_efficiency(context: int) -> float:
    """What `context` GPUs on one clip do of `context` times one."""
    return float(EIGHT ** (math.log2(context) / 3))


def seconds(flops: float, gpu: Gpu, mesh: Layout, branches: int) -> float:
    """Of one item on a gang: denoising alone. Halves of the guidance exchange one prediction a step, counted as none;
    without a second branch the other half has nothing to do."""
    ranks = mesh.context * context_efficiency(mesh.context) * min(mesh.cfg, branches)
    return flops / (gpu.tflops * 1e12 * EFFICIENCY * ranks)


def gib(count: int) -> str:
    """For people."""
    return f"{count / GIB:.3g} GiB"
