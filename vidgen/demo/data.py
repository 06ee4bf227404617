"""The demo model's world: coloured shapes that move on black, as prompts and as pixels, generated from a seed.

Which of the 96 combinations training never sees is decided here. Refuses to know about models, files and training.

Shapes: B clips, F frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (50, 205, 70),
    "blue": (55, 85, 250),
    "yellow": (245, 235, 50),
    "white": (245, 245, 245),
    "purple": (165, 60, 230),
    "orange": (250, 140, 25),
    "cyan": (50, 220, 230),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE = 64
FRAMES = 17
FPS = 8

# Half width and half height of a shape of radius 1: the three look equally large, the triangle points up.
EXTENT = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.15, 1.0)}
RADIUS = (10.0, 13.0)
SPEED = (1.0, 1.8)
"""Pixels a frame: 16 to 29 pixels over a clip, a quarter of the picture or more, and room for every radius."""
MARGIN = 1.0
"""Black pixels that stay between a shape and the border."""


@dataclass(frozen=True, slots=True)
class Combination:
    """What a prompt of the demo says."""

    colour: str
    shape: str
    direction: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @property
    def held_out(self) -> bool:
        """True for the 24 of 96 that training never sees.

        A Latin pattern: each colour-shape pair misses one of its four directions, each colour-direction pair at most
        one of its three shapes, each shape-direction pair two of its eight colours. So no word and no pair of words is
        new in a held-out prompt, only the triple.
        """
        colour = list(COLOURS).index(self.colour)
        direction = list(DIRECTIONS).index(self.direction)
        return SHAPES.index(self.shape) == (colour + direction) % len(DIRECTIONS)


COMBINATIONS = tuple(Combination(*words) for words in product(COLOURS, SHAPES, DIRECTIONS))
TRAINED = tuple(c for c in COMBINATIONS if not c.held_out)
HELD_OUT = tuple(c for c in COMBINATIONS if c.held_out)


def clips(combinations: list[Combination], generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """One random clip per combination: float32 [B, 3, F, 64, 64] in [-1, 1], the shape wholly visible throughout.

    Radius, speed and place are uniform within RADIUS, SPEED and what keeps the shape inside; edges are anti-aliased
    over one pixel by signed distance. `frames` < 17 gives a random stretch of a full clip.
    """
    batch = len(combinations)
    random = torch.rand(5, batch, generator=generator)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * random[0]
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * random[1]
    half = radius * torch.tensor([EXTENT[c.shape] for c in combinations]).T  # [2, B], x then y
    heading = torch.tensor([DIRECTIONS[c.direction] for c in combinations], dtype=torch.float32).T  # [2, B]
    room = SIZE / 2 - MARGIN - half  # the centre stays within +-room of the middle of the picture
    travel = speed * (FRAMES - 1) * heading
    middle = (2 * random[2:4] - 1) * (room - travel.abs() / 2)  # where the centre is half-way through
    first = torch.floor(random[4] * (FRAMES - frames + 1))
    progress = (first[:, None] + torch.arange(frames)) / (FRAMES - 1) - 0.5  # [B, F]
    centre = SIZE / 2 + middle[..., None] + travel[..., None] * progress  # [2, B, F]
    pixel = torch.arange(SIZE) + 0.5
    dx = pixel - centre[0][:, :, None, None]  # [B, F, 1, W]
    dy = (pixel[:, None] - centre[1][:, :, None, None]).expand(batch, frames, SIZE, 1)  # [B, F, H, 1]
    hx, hy = half[:, :, None, None, None]
    distance = {
        "circle": lambda x, y, hx, hy: torch.hypot(x, y) - hx,
        "square": lambda x, y, hx, hy: torch.maximum(x.abs() - hx, y.abs() - hy),
        "triangle": lambda x, y, hx, hy: torch.maximum(
            (x.abs() * 2 * hy - (y + hy) * hx) / torch.hypot(2 * hy, hx), y - hy
        ),
    }
    coverage = torch.empty(batch, 1, frames, SIZE, SIZE)
    for shape in SHAPES:
        mine = [i for i, c in enumerate(combinations) if c.shape == shape]
        if mine:
            signed = distance[shape](dx[mine], dy[mine], hx[mine], hy[mine])
            coverage[mine, 0] = (0.5 - signed).clamp(0, 1)
    colour = torch.tensor([COLOURS[c.colour] for c in combinations])[:, :, None, None, None] / 255
    return 2 * colour * coverage - 1


def draw(count: int, generator: torch.Generator) -> list[Combination]:
    """`count` trained combinations, uniform, with replacement."""
    return [TRAINED[i] for i in torch.randint(len(TRAINED), (count,), generator=generator).tolist()]
