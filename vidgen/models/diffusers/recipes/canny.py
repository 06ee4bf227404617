"""Canny's edge detector (1986), as ControlNets were trained with it: white lines on black.

The variant of OpenCV's `cv2.Canny(image, low, high)`: 3 x 3 Sobel on each colour and the strongest of the three, sum of
absolute derivatives, thinning by sector, edges that touch a strong one. In numpy, so that nothing else is needed.
Letters: H height, W width.
"""

from __future__ import annotations

import numpy as np

_TAN = 13573
"""tan(22.5 degrees) in 1 / 2**15, as OpenCV has it."""


def edges(picture: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> uint8 RGB [H, W, 3], 255 on edges and 0 elsewhere. An edge's strength is above `low`, and
    it is joined to one above `high`; thresholds are of the sum of both absolute derivatives."""
    low, high = sorted((int(np.floor(low)), int(np.floor(high))))
    dx, dy, strength = _gradient(picture)
    peaks = _thinned(dx, dy, strength) & (strength > low)
    lines = _joined(peaks, peaks & (strength > high))
    return np.repeat(lines[:, :, None].astype(np.uint8) * 255, 3, axis=2)


def _gradient(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives along x and y and their strength [H, W], of the colour where that is largest; the border repeats."""
    grown = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    along = grown[:, 2:] - grown[:, :-2]
    dx = along[:-2] + 2 * along[1:-1] + along[2:]
    across = grown[2:] - grown[:-2]
    dy = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    strength = np.abs(dx) + np.abs(dy)
    best = strength.argmax(axis=2)[:, :, None]
    taken = (np.take_along_axis(values, best, axis=2)[:, :, 0] for values in (dx, dy, strength))
    first, second, third = taken
    return first, second, third


def _thinned(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Where the strength is the largest across the line: along x, along y or along a diagonal, by the sector of the
    gradient. Of two equal neighbours the second is dropped."""
    grown = np.pad(strength, 1)
    height, width = strength.shape

    def beside(down: int, right: int) -> np.ndarray:
        return grown[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = y < x * _TAN
    steep = y > x * _TAN + (x << 16)
    along_x = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    along_y = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    falling = (strength > beside(-1, -1)) & (strength > beside(1, 1))
    rising = (strength > beside(-1, 1)) & (strength > beside(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(flat, along_x, np.where(steep, along_y, diagonal))


def _joined(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """All of `weak` that is joined to `strong` through neighbours, the diagonal ones included."""
    found = strong.copy()
    while True:
        grown = np.pad(found, 1)
        rows = grown[:-2] | grown[1:-1] | grown[2:]
        near = (rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]) & weak
        if (near == found).all():
            return found
        found = near
