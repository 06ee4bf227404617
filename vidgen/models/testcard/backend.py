"""A seeded moving test card: the smallest backend there is, and the example of the contract.

`load` gives an object whose `generate(requests, hooks)` yields one Video a request, as every backend does; no weights,
no torch. Equal requests give equal frames. Conditioning media are shown small in the picture that they condition.
Refuses to know where its frames go.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidgen import conditioning, media
from vidgen.conditioning import Conditioning
from vidgen.errors import Cancelled, CapacityError, ItemError
from vidgen.models.testcard.spec import fails
from vidgen.types import Hooks, ModelSettings, Request, Video

BARS = ((192, 192, 192), (192, 192, 0), (0, 192, 192), (0, 192, 0), (192, 0, 192), (192, 0, 0), (0, 0, 192))
"""Colour bars at 75 %, as RGB."""
CHUNK = 8
"""Frames drawn at a time."""


def load(settings: ModelSettings | None = None) -> Backend:
    """A backend that needs nothing: what concerns weights and devices has no meaning here."""
    return Backend()


class Backend:
    """Draws test cards. `gpu` names the processor for the manifest."""

    gpu = ""
    checkpoint_hash = ""
    dtype = "uint8"

    def __init__(self) -> None:
        self.node = platform.node()

    def generate(self, requests: Sequence[Request], hooks: Hooks) -> Iterator[Video]:
        """One Video a request, in order. All requests of a call take their steps together, like a batch."""
        if not requests:
            return
        begun = time.perf_counter()
        hooks.progress("encode", 0, 0)
        cards = [_card(request) for request in requests]
        encoded_at = time.perf_counter()
        _denoise(requests, hooks)
        denoised_at = time.perf_counter()
        for request, card in zip(requests, cards, strict=True):
            seconds = {"encode": encoded_at - begun, "denoise": denoised_at - encoded_at, "decode": 0.0}
            counts = {"forwards": request.num_inference_steps}
            video = Video(request, iter(()), self.dtype, batch=len(requests), seconds=seconds, counts=counts)
            if request.param("ready", False):
                plain = replace(request, image=None, last_image=None, video=None)
                video.encoded = _ready(replace(plain, prompt="", negative_prompt="", seed=0))
            else:
                video.chunks = _decode(card, request, hooks, seconds)
            yield video


def _card(request: Request) -> functools.partial[np.ndarray]:
    """What draws the frames of a request; its media are read here, whatever is drawn."""
    media = conditioning.read(request)
    return functools.partial(_black, request) if fails(request) == "black" else functools.partial(draw, request, media)


def draw(request: Request, media: Conditioning, first: int, count: int) -> np.ndarray:
    """Frames `first` to `first + count - 1` of a request's card: uint8 RGB [count, H, W, 3]. Bars that drift, a disc
    that bounces, and where there is room the prompt, the seed and a frame counter; all follow from the prompt and the
    seed. `inset` tells where the conditioning media are shown."""
    height, width = request.height, request.width
    word = hashlib.sha256(f"{request.seed}\0{request.prompt}\0{request.negative_prompt}".encode()).digest()
    bars = np.array(BARS, np.uint8)[np.random.default_rng(word[0]).permutation(len(BARS))]
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        number = first + index
        drift = width * number * (1 + word[1] % 3) / (8 * request.num_frames)
        frames[index] = bars[((x + drift) * len(bars) / width).astype(int) % len(bars)]
        _ramp(frames[index], number, request.num_frames, word)
        middle, radius = _disc(number, height, width, request.fps, word)
        distance = np.hypot(y - middle[0], x - middle[1])
        frames[index][distance <= radius] = (12, 12, 16)
        frames[index][distance <= radius * 0.72] = 255 - bars[word[2] % len(bars)] // 3
        _label(frames[index], request, number)
        shown = {"image": media.image, "last_image": media.last_image}
        shown["video"] = None if media.video is None else media.video[number]
        for name, picture in shown.items():
            if picture is not None:
                rows, columns = inset(name, height, width)
                small = (columns.stop - columns.start, rows.stop - rows.start)
                frames[index, rows, columns] = np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.BOX))
    return frames


def inset(name: str, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a frame that show a conditioning medium at a quarter of its size: the image, or the video's
    frame of the same number, at the left, the last image at the right, above the ramp."""
    bottom, high, wide = height - max(1, height // 5), max(1, height // 4), max(1, width // 4)
    left = width - wide if name == "last_image" else 0
    return slice(bottom - high, bottom), slice(left, left + wide)


def _ramp(frame: np.ndarray, number: int, total: int, word: bytes) -> None:
    """The lower fifth: a grey ramp, and a white mark that crosses it once from the first frame to the last."""
    height, width = frame.shape[:2]
    top = height - max(1, height // 5)
    frame[top:] = np.linspace(16, 235, width).astype(np.uint8)[None, :, None]
    if word[3] % 2:
        frame[top:] = frame[top:, ::-1]
    at = round(number * (width - 1) / max(1, total - 1))
    frame[top:, max(0, at - width // 32) : at + width // 32 + 1] = 255


def _disc(number: int, height: int, width: int, fps: float, word: bytes) -> tuple[tuple[float, float], float]:
    """Middle (y, x) and radius in pixels of the disc: it swings at a speed and a phase of its own on each axis."""
    radius = min(height, width) / 7
    place = []
    for side, speed, phase in ((height * 0.8, word[4], word[5]), (width, word[6], word[7])):
        turn = number / fps * (0.25 + speed / 512) + phase / 256
        swing = 2 * abs(turn % 1 - 0.5)
        place.append(radius + swing * max(0.0, side - 2 * radius))
    return (place[0], place[1]), radius


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _label(frame: np.ndarray, request: Request, number: int) -> None:
    """Writes frame counter and seed on a dark strip, below it the prompt where the card has 96 x 96 pixels; none
    below 48 x 48."""
    height, width = frame.shape[:2]
    if min(height, width) < 48:
        return
    picture = Image.fromarray(frame)
    pen = ImageDraw.Draw(picture)
    size = max(8, min(height, width) // 16)
    font = _font(size)
    fits = max(1, int(width / (size * 0.55)))
    seed = f"seed {request.seed}" if len(f"{number} seed {request.seed}") < fits else str(request.seed)
    lines = [f"{number} {seed}"[:fits], request.prompt[:fits]]
    for row, text in enumerate(lines[: 2 if min(height, width) >= 96 else 1]):
        top = row * (size + 4)
        pen.rectangle((0, top, width, top + size + 3), fill=(12, 12, 16))
        pen.text((2, top + 1), text, fill=(240, 240, 240), font=font)
    frame[:] = np.asarray(picture)


def _black(request: Request, first: int, count: int) -> np.ndarray:
    return np.zeros((count, request.height, request.width, 3), np.uint8)


def _denoise(requests: Sequence[Request], hooks: Hooks) -> None:
    """The steps: each takes `step_seconds`, reports, and asks whether to go on; the failure asked for comes halfway."""
    steps = max(r.num_inference_steps for r in requests)
    pause = max(float(r.param("step_seconds", 0.0) or 0.0) for r in requests)
    for step in range(steps):
        if hooks.cancelled():
            raise Cancelled
        if step == steps // 2:
            for request in requests:
                _fail(fails(request))
        if pause > 0:
            time.sleep(pause)
        hooks.progress("denoise", step + 1, steps)


def _fail(fail: str) -> None:
    if fail == "item":
        raise ItemError("params.fail is 'item': this row was asked to fail")
    if fail == "nan":
        raise ItemError("latents are not finite after the last step (params.fail is 'nan')")
    if fail == "capacity":
        raise CapacityError("out of memory (params.fail is 'capacity')")
    if fail == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    while fail == "hang":  # deaf to a cancel too, as a stuck kernel is
        time.sleep(1.0)


def _decode(
    card: functools.partial[np.ndarray], request: Request, hooks: Hooks, seconds: dict[str, float]
) -> Iterator[np.ndarray]:
    for first in range(0, request.num_frames, CHUNK):
        begun = time.perf_counter()
        chunk = card(first, min(CHUNK, request.num_frames - first))
        seconds["decode"] += time.perf_counter() - begun
        hooks.progress("decode", first + len(chunk), request.num_frames)
        yield chunk


@functools.lru_cache(maxsize=8)
def _ready(request: Request) -> bytes:
    """One mp4 of that shape, made once per process."""
    with tempfile.TemporaryDirectory() as folder:
        chunks = (
            draw(request, Conditioning(), first, min(CHUNK, request.num_frames - first))
            for first in range(0, request.num_frames, CHUNK)
        )
        return media.write(Video(request, chunks, "uint8"), Path(folder) / "card.mp4").path.read_bytes()
