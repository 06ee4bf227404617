"""How well the demo model does what its prompts say, judged on the frames of decoded mp4 files.

`python -m vidgen.demo.measure [CHECKPOINT]` makes one clip for each of the 96 prompts, with fresh seeds, and prints the
table. Refuses to know how the model was trained.
"""

from __future__ import annotations

import argparse
import colorsys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vidgen import engine, media
from vidgen.demo import data

UNCLEAR = "unclear"
BRIGHT = 0.35
"""A pixel belongs to the shape when its strongest channel is above this share of full scale."""
LEAST_TRAVEL = 6.0
"""Pixels that a shape must go for its motion to count; training clips go 16 to 29."""
GREY = 0.25
"""Saturation below which a colour is white."""
CORNER = 0.15
"""Side of a corner of the bounding box, as a share of the box's."""
PROTOTYPES = {"circle": (0.785, 0.0, 0.0), "square": (1.0, 1.0, 1.0), "triangle": (0.5, 0.0, 0.75)}
"""How much of its bounding box an ideal shape fills, and of the box's upper and lower corners."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a clip shows, in the words of a prompt, or `unclear`; `travel` in pixels (right, down)."""

    colour: str
    shape: str
    direction: str
    travel: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Result:
    """A prompt, the seed that was used, and what came out."""

    asked: data.Combination
    seed: int
    seen: Seen

    @property
    def right(self) -> tuple[bool, bool, bool]:
        """Colour, direction and shape as asked."""
        asked, seen = self.asked, self.seen
        return asked.colour == seen.colour, asked.direction == seen.direction, asked.shape == seen.shape


def judge(frames: np.ndarray) -> Seen:
    """What uint8 frames [F, H, W, 3] show. Frames without a shape are passed over; a clip that has one in fewer than
    half of its frames is unclear throughout."""
    light = frames.max(axis=3) / 255.0
    masks = light > BRIGHT
    lit = [i for i in range(len(frames)) if masks[i].sum() >= 16]
    if len(lit) < max(2, len(frames) // 2):
        return Seen(UNCLEAR, UNCLEAR, UNCLEAR, (0.0, 0.0))
    travel = _travel(masks[lit])
    return Seen(_colour(frames[lit], light[lit]), _shape(masks[lit]), _direction(travel), travel)


def _colour(frames: np.ndarray, light: np.ndarray) -> str:
    """Nearest hue of the mean over the brighter half of the shape's pixels: its inside, not its edge."""
    inside = light > max(BRIGHT, float(np.median(light[light > BRIGHT])) * 0.9)
    mean = frames[inside].mean(axis=0) / 255.0
    hue, saturation, _ = colorsys.rgb_to_hsv(*mean)
    if saturation < GREY:
        return "white"
    hues = {name: colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in data.COLOURS.items()}
    del hues["white"]
    return min(hues, key=lambda name: abs((hue - hues[name] + 0.5) % 1.0 - 0.5))


def _travel(masks: np.ndarray) -> tuple[float, float]:
    """How far the centroid goes, from the mean of the first three frames to the mean of the last three."""
    centres = np.array([[columns.mean(), rows.mean()] for rows, columns in map(np.nonzero, masks)])
    right, down = centres[-3:].mean(axis=0) - centres[:3].mean(axis=0)
    return float(right), float(down)


def _direction(travel: tuple[float, float]) -> str:
    """The axis that clearly dominates: twice the other, and far enough to be seen."""
    right, down = travel
    along, across = max(abs(right), abs(down)), min(abs(right), abs(down))
    if along < LEAST_TRAVEL or along < 2 * across:
        return UNCLEAR
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _shape(masks: np.ndarray) -> str:
    """The nearest of PROTOTYPES, by medians over the frames."""
    marks = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        high, wide = (max(1, round(CORNER * size)) for size in box.shape)
        upper = [box[:high, :wide].mean(), box[:high, -wide:].mean()]
        lower = [box[-high:, :wide].mean(), box[-high:, -wide:].mean()]
        marks.append((box.mean(), np.mean(upper), np.mean(lower)))
    seen = np.median(marks, axis=0)
    return min(PROTOTYPES, key=lambda name: float(np.square(seen - PROTOTYPES[name]).sum()))


def measure(
    loaded: engine.Engine, asked: Iterable[data.Combination], first_seed: int, folder: Path
) -> Iterator[Result]:
    """Makes, writes, reads back and judges one clip a combination, with seeds counted up from `first_seed`."""
    for seed, combination in enumerate(asked, first_seed):
        (video,) = loaded.generate([loaded.request(combination.prompt, seed=seed)])
        path = folder / f"{combination.prompt.replace(' ', '-')}-{seed}.mp4"
        media.write(video, path)
        yield Result(combination, seed, judge(media.read_frames(path)))


def table(results: list[Result]) -> str:
    """Percent right in all, held-out and trained combinations, by word, and every miss."""
    groups: list[tuple[str, list[Result]]] = [
        ("all", results),
        ("trained", [r for r in results if not r.asked.held_out]),
        ("held out", [r for r in results if r.asked.held_out]),
    ]
    groups += [(c, [r for r in results if r.asked.colour == c]) for c in data.COLOURS]
    groups += [(s, [r for r in results if r.asked.shape == s]) for s in data.SHAPES]
    groups += [(d, [r for r in results if r.asked.direction == d]) for d in data.DIRECTIONS]
    lines = [f"{'':10s} {'clips':>5s} {'colour':>7s} {'direction':>9s} {'shape':>6s}"]
    for name, members in groups:
        if members:
            colour, direction, shape = 100 * np.mean([r.right for r in members], axis=0)
            lines.append(f"{name:10s} {len(members):5d} {colour:6.1f}% {direction:8.1f}% {shape:5.1f}%")
    for r in results:
        if not all(r.right):
            kind = "held out" if r.asked.held_out else "trained"
            lines.append(
                f"missed ({kind}, seed {r.seed}): {r.asked.prompt}: saw {r.seen.colour} {r.seen.shape} moving "
                f"{r.seen.direction} (by {r.seen.travel[0]:+.0f}, {r.seen.travel[1]:+.0f} pixels)"
            )
    return "\n".join(lines)


def contact_sheet(paths: list[Path], across: int = 4) -> Image.Image:
    """First, middle and last frame of each clip, `across` clips a row."""
    strips = []
    for path in paths:
        frames = media.read_frames(path)
        chosen = frames[[0, len(frames) // 2, len(frames) - 1]]
        strips.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=70) for f in chosen], axis=1))
    strips += [np.zeros_like(strips[0])] * (-len(strips) % across)
    rows = [np.concatenate(strips[i : i + across], axis=1) for i in range(0, len(strips), across)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "checkpoint", nargs="?", default="demo", help="a checkpoint folder; default: the one that ships"
    )
    parser.add_argument("--seed", type=int, default=1_000_000, help="seed of the first clip; the others follow")
    parser.add_argument("--clips", type=Path, help="folder to keep the mp4 files in")
    parser.add_argument("--sheet", type=Path, help="PNG to write: first, middle and last frame of each clip")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.clips or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        results = list(measure(engine.load(arguments.checkpoint), data.COMBINATIONS, arguments.seed, folder))
        print(table(results))
        print(f"{(time.monotonic() - started) / len(results):.2f} s a clip")
        if arguments.sheet:
            contact_sheet(sorted(folder.glob("*.mp4"))).save(arguments.sheet)


if __name__ == "__main__":
    main()
