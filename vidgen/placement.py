"""Which gang makes which shape, and whether it can: a configuration's `parallel` against the memory of a named GPU.

With `parallel.degree: auto` it chooses: the fewest GPUs that hold an item, more where it would take too long. That is
arithmetic on what `vidgen.memory` counts, and nothing else: the same shapes, GPU and number of GPUs give the same
choice. Refuses to know rows, and the machines of a cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vidgen import memory
from vidgen.errors import ConfigError
from vidgen.memory import Need, Sizing, gib, usable
from vidgen.parallel.layout import Band, Layout, bands, layout
from vidgen.specs.footprint import Footprint
from vidgen.specs.gpus import GPUS, Gpu
from vidgen.types import Request

MOST_CONTEXT = 64
"""The largest degree that is tried."""
LONG_SECONDS = 30 * 60
"""Above so many predicted seconds an item, `degree: auto` gives it more GPUs than must be: a crash costs what an item
has taken, and the last items keep all others waiting."""
LARGEST = 8
"""GPUs to which `degree: auto` goes for speed alone: those of one machine. For room it goes on to MOST_CONTEXT."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One shape on the GPU that was named. `fits` is None where only the weights are known and those do; `smallest` is
    the least context degree that fits, None if none does. `why`: how `degree: auto` came to the mesh."""

    gpu: str
    mesh: Layout
    need: Need
    usable: int
    fits: bool | None
    smallest: int | None
    seconds: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For a plan's estimate."""
        return {
            "gpu": self.gpu,
            "gpus": self.mesh.size,
            "context": self.mesh.context,
            "mesh": str(self.mesh),
            "why": self.why,
            "memory_bytes": self.need.bytes,
            "usable_bytes": self.usable,
            "fits": self.fits,
            "smallest_context": self.smallest,
            "seconds_per_item": self.seconds,
            "stage": self.need.fullest,
            "terms": [{"name": t.name, "bytes": t.bytes, "formula": t.formula} for t in self.need.terms],
        }


@dataclass(frozen=True, slots=True)
class Planned:
    """A shape of a plan: a request of it, without prompts, seed and media; its cost; and how many items have it."""

    label: str
    request: Request
    tokens: int
    flops: float
    items: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """What `degree: auto` gives a shape, and why."""

    label: str
    tokens: int
    context: int
    why: str


@dataclass(frozen=True)
class Placement:
    """A configuration's `parallel` for one checkpoint: which mesh makes a shape, and whether that can work.

    `parallel` is the configuration's mapping, `by_shape` included; its meshes are checked when it is made. Without
    `parallel.gpu` nothing is said about fit. `whys` says why, by label, where the degrees were chosen.
    """

    sizing: Sizing | None
    parallel: Mapping[str, Any]
    heads: int
    whys: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        assert self.bands, "the configuration's own mesh is always one"
        if self.auto and (self.sizing is None or self.sizing.footprint is None):
            raise ConfigError(
                "parallel.degree: auto needs a model whose memory is known; allowed for this one: null, 1"
            )

    @property
    def auto(self) -> bool:
        """Whether the degrees are still to be chosen."""
        return bool(self.parallel.get("degree") == "auto")

    @property
    def gpu(self) -> str | None:
        """The name of the GPU that the plan is for."""
        name = self.parallel.get("gpu")
        return None if name is None else str(name)

    @cached_property
    def bands(self) -> list[Band]:
        """See `vidgen.parallel.layout.bands`; with `degree: auto` one, of the configured `cfg` alone."""
        return bands({**self.parallel, "degree": None} if self.auto else self.parallel, self.heads)

    def gangs(self) -> list[dict[str, Any]]:
        """For a plan's estimate: the mesh of each band, split for one node; [] where every replica is one GPU."""
        if all(band.layout.size == 1 for band in self.bands):
            return []
        return [{"tokens_above": band.above, "mesh": str(band.layout)} for band in self.bands]

    def of(self, shape: Planned) -> Fit | None:
        """How a shape fits; None without a named GPU or a sizing. With `degree: auto` on as many GPUs as it wants.

        ConfigError where the configured degree does not fit, naming the smallest that does; and where none does, naming
        the GPUs that would.
        """
        if self.gpu is None or self.sizing is None:
            return None
        gpu = GPUS[self.gpu]
        band = next(band for band in reversed(self.bands) if shape.tokens > band.above)
        footprint = None if self.sizing.footprint is None else self.sizing.footprint(shape.request)
        smallest = self._smallest(shape.request, footprint, band.layout, gpu)
        mesh, why = band.layout, (self.whys or {}).get(shape.label, "")
        if self.auto and smallest is not None:
            context, why = self._grown(shape, footprint, smallest, LARGEST)
            mesh = self._mesh(context)
            why = f"{mesh}: {why}"
        need = self.sizing.need(shape.request, mesh, footprint)
        fitting = need.bytes <= usable(gpu)
        if smallest is None or (band.degree_said and not fitting):
            raise ConfigError(self._problem(shape, band.key, mesh, need, smallest, footprint))
        took = memory.seconds(shape.flops, gpu, mesh, _branches(footprint))
        return Fit(self.gpu, mesh, need, usable(gpu), (fitting if need.whole else None), smallest, took, why)

    def settled(self, shapes: Sequence[Planned], gpus: int | None = None) -> Placement:
        """With `degree: auto`, the placement whose `context` and `by_shape` give each of these shapes its degree on a
        cluster of so many GPUs (None: as many as are wanted); else this one.

        A shape gets the smallest degree that fits; doubled, up to LARGEST, while its item takes more than LONG_SECONDS,
        or while all items of the plan together would leave half of the GPUs idle. A shape of more tokens never gets
        less than one of fewer. Where the gangs of all bands are more than the GPUs, the wish for speed goes first, then
        the difference between shapes. ConfigError where what must be is more than the GPUs.
        """
        if not self.auto:
            return self
        rising = sorted(shapes, key=lambda shape: (shape.tokens, shape.label))
        found = self._chosen(rising, gpus, LARGEST)
        for most in (4, 2, 1):
            if gpus is None or self._together(found) <= gpus:
                break
            found = self._chosen(rising, gpus, most)
        while gpus is not None and self._together(found) > gpus:
            least, wider, *_ = sorted({choice.context for choice in found})
            why = f"{gpus} GPUs have no room for a gang of each kind"
            found = [replace(one, context=wider, why=why) if one.context == least else one for one in found]
        whys = {one.label: f"{self._mesh(one.context)}: {one.why}" for one in found}
        return replace(self, parallel=self._written(found), whys=whys)

    def _chosen(self, rising: Sequence[Planned], gpus: int | None, most: int) -> list[Choice]:
        assert self.sizing is not None and self.sizing.footprint is not None and self.gpu is not None
        items, choices = sum(shape.items for shape in rising), []
        for shape in rising:
            footprint = self.sizing.footprint(shape.request)
            least = self._smallest(shape.request, footprint, self._mesh(1), GPUS[self.gpu])
            if least is None:
                self.of(shape)
                raise AssertionError("a shape that fits nowhere is refused")
            if gpus is not None and self._mesh(least).size > gpus:
                need = self.sizing.need(shape.request, self._mesh(least // 2 or 1), footprint)
                raise ConfigError(
                    f"parallel.degree: auto: {shape.label} needs {self._mesh(least).size} of {self.gpu} (on half of "
                    f"them {gib(need.bytes)} each, where {gib(usable(GPUS[self.gpu]))} are), and there are {gpus} GPUs"
                )
            room = most if gpus is None else min(most, gpus // self._mesh(1).size)
            context, why = self._grown(shape, footprint, least, room)
            while gpus is not None and 2 * context <= room and items * self._mesh(2 * context).size <= gpus:
                context, why = 2 * context, f"{items} items, and room for {gpus} ranks"
            choices.append(Choice(shape.label, shape.tokens, context, why))
        widest = Choice("", -1, 1, "")
        for index, choice in enumerate(choices):
            if choice.context < widest.context:
                choices[index] = replace(choice, context=widest.context, why=f"as {widest.label} has")
            else:
                widest = choice
        for index in range(len(choices) - 1, 0, -1):
            one, other = choices[index - 1], choices[index]
            if one.tokens == other.tokens and one.context < other.context:
                choices[index - 1] = replace(one, context=other.context, why=f"as {other.label} has")
        return choices

    def _grown(self, shape: Planned, footprint: Footprint | None, least: int, most: int) -> tuple[int, str]:
        """(degree, why): from the least that fits on, doubled while an item takes too long."""
        assert self.gpu is not None

        def seconds(context: int) -> float:
            return memory.seconds(shape.flops, GPUS[str(self.gpu)], self._mesh(context), _branches(footprint))

        context = least
        while seconds(context) > LONG_SECONDS and 2 * context <= most:
            context *= 2
        if context == least:
            return context, "it fits" if least == 1 else f"it needs the memory of {least}"
        return context, f"{seconds(least) / 60:,.0f} minutes an item with {least}"

    def _together(self, choices: Sequence[Choice]) -> int:
        """GPUs of one gang of each degree."""
        return sum(self._mesh(context).size for context in {choice.context for choice in choices})

    def _written(self, rising: Sequence[Choice]) -> dict[str, Any]:
        """The choice as a configuration's `parallel` says it."""
        cfg = self.bands[0].layout.cfg
        entries = [
            {"tokens_above": before.tokens, "context": choice.context, "cfg": cfg}
            for before, choice in itertools.pairwise(rising)
            if choice.context > before.context
        ]
        return {**self.parallel, "degree": None, "context": rising[0].context if rising else 1, "by_shape": entries}

    def _mesh(self, context: int) -> Layout:
        return layout({"context": context, "cfg": self.bands[0].layout.cfg}, self.heads)

    def _smallest(self, request: Request, footprint: Footprint | None, mesh: Layout, gpu: Gpu) -> int | None:
        assert self.sizing is not None
        context = 1
        while context <= MOST_CONTEXT:
            tried = layout({"context": context, "cfg": mesh.cfg}, self.heads)
            if self.sizing.need(request, tried, footprint).bytes <= usable(gpu):
                return context
            context *= 2
        return None

    def _problem(
        self, shape: Planned, key: str, mesh: Layout, need: Need, smallest: int | None, footprint: Footprint | None
    ) -> str:
        name, label = str(self.gpu), shape.label
        has = f"{gib(need.bytes)} on a GPU to {need.fullest}, and {name} (parallel.gpu) has {gib(usable(GPUS[name]))}"
        if smallest is not None:
            return f"{key}.context: {mesh.context}: {label} needs {has}; the smallest that fits: {smallest}"
        others = [n for n, gpu in GPUS.items() if self._smallest(shape.request, footprint, mesh, gpu) is not None]
        largest = ", ".join(f"{term.name} {gib(term.bytes)}" for term in need.terms[:2])
        return (
            f"parallel.gpu: {name!r}: {label} needs {has}, and no {key}.context up to {MOST_CONTEXT} fits ({largest}); "
            f"allowed: {', '.join(others) or 'null, to plan without this check'}"
        )


def _branches(footprint: Footprint | None) -> int:
    return 1 if footprint is None else footprint.branches
