"""The test card: the smallest backend, and what it promises to who tries a cluster with it."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vidgen import family, media
from vidgen.errors import Cancelled, CapacityError, ConfigError, ItemError
from vidgen.models.testcard import backend, spec
from vidgen.types import Hooks, Media, Request, Video


def _request(**changes: Any) -> Request:
    values = spec.defaults("t2v", spec.read({}))
    params = values["params"] | changes.pop("params", {})
    fields = values | {"task": "t2v", "prompt": "a red circle", "seed": 7, "num_frames": 9} | changes
    return Request(**fields | {"params": tuple(sorted(params.items()))})


def _frames(request: Request, hooks: Hooks | None = None) -> np.ndarray:
    (video,) = backend.load().generate([request], hooks or Hooks())
    return np.concatenate(list(video.chunks))


def test_it_is_a_family_because_its_folder_is_there() -> None:
    assert "testcard" in family.families()
    assert family.spec("testcard") is spec
    assert spec.weight_bytes(spec.read({})) == 0 and not spec.CHECKPOINT


def test_its_defaults_break_none_of_its_rules() -> None:
    assert spec.problems(_request(), spec.read({}), {}) == []
    assert set(spec.defaults("t2v", spec.read({}))["params"]) == set(spec.PARAMS)
    with pytest.raises(ConfigError, match=r"'s2v'.*allowed: t2v, i2v, v2v"):
        spec.defaults("s2v", spec.read({}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 4}, "height is 4; a test card can be 8 to 4096"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"sampler": "euler"}, "sampler is 'euler'; allowed: card"),
        ({"shift": 3.0}, "shift is given"),
        ({"task": "s2v"}, "task is 's2v'; allowed: t2v, i2v, v2v"),
        ({"image": Media("x.png", "")}, "image is given; t2v takes none"),
        ({"task": "i2v"}, "image is missing; i2v needs one"),
        ({"task": "v2v", "video": Media("x.mp4", ""), "image": Media("x.png", "")}, "image is given; v2v takes video"),
        ({"params": {"fail": "fire"}}, "params.fail is 'fire'; allowed: '', 'item'"),
        ({"params": {"fail_share": 1.5}}, "params.fail_share is 1.5"),
        ({"params": {"step_seconds": -1.0}}, "params.step_seconds is -1.0"),
    ],
)
def test_a_broken_rule_is_a_sentence_with_the_value_and_the_allowed_ones(changes: dict, words: str) -> None:
    (problem,) = spec.problems(_request(**changes), spec.read({}), {})
    assert problem.startswith(words)


@pytest.mark.parametrize("size", [(64, 64, 17), (9, 13, 1), (180, 320, 10)])
def test_the_frames_have_the_shape_of_the_request(size: tuple[int, int, int]) -> None:
    height, width, count = size
    request = _request(height=height, width=width, num_frames=count)
    frames = _frames(request)
    assert frames.shape == (count, height, width, 3) and frames.dtype == np.uint8
    assert spec.frames_out(request) == count


def test_equal_requests_give_equal_frames_alone_and_in_a_batch() -> None:
    one, two = _request(seed=1), _request(seed=2)
    batch = [np.concatenate(list(video.chunks)) for video in backend.load().generate([one, two], Hooks())]
    assert np.array_equal(batch[0], _frames(one)) and np.array_equal(batch[1], _frames(two))


def test_conditioning_media_are_shown_in_their_corners(tmp_path: Path) -> None:
    def picture(level: int) -> Media:
        png = io.BytesIO()
        Image.new("RGB", (64, 64), (level, 0, 255 - level)).save(png, "PNG")
        return Media("", "", png.getvalue())

    frames = _frames(_request(task="i2v", image=picture(200), last_image=picture(50)))
    for name, level in (("image", 200), ("last_image", 50)):
        rows, columns = backend.inset(name, 64, 64)
        assert (frames[:, rows, columns] == (level, 0, 255 - level)).all()
    clip = media.start(tmp_path / "clip.zip", (64, 64), 8.0, format="png")
    clip.frames(np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((9, 64, 64, 3), 20, np.uint8))
    clip.finish()
    frames = _frames(_request(task="v2v", video=Media(str(tmp_path / "clip.zip"), "")))
    rows, columns = backend.inset("video", 64, 64)
    assert [int(frame[rows, columns].mean()) for frame in frames] == [20 * number for number in range(9)]


def test_a_medium_that_cannot_be_read_is_the_rows_fault_even_of_a_black_card() -> None:
    request = _request(task="i2v", image=Media("", "", b"no picture"), params={"fail": "black"})
    with pytest.raises(ItemError, match="image: the data is not a picture"):
        _frames(request)


def test_another_process_draws_the_same_frames() -> None:
    code = (
        "import hashlib; from tests.models.testcard.test_testcard import _frames, _request;"
        "print(hashlib.sha256(_frames(_request())).hexdigest())"
    )
    root = Path(__file__).parents[3]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert other.stdout.strip() == hashlib.sha256(_frames(_request()).tobytes()).hexdigest()


@pytest.mark.parametrize("changes", [{"seed": 8}, {"prompt": "a blue square"}])
def test_another_seed_or_prompt_is_another_card(changes: dict) -> None:
    assert not np.array_equal(_frames(_request()), _frames(_request(**changes)))


def test_the_card_moves_in_every_frame() -> None:
    frames = _frames(_request(num_frames=12))
    assert all(not np.array_equal(a, b) for a, b in pairwise(frames))


def test_every_step_reports() -> None:
    heard: list[tuple[str, int, int]] = []
    _frames(_request(num_inference_steps=5), Hooks(progress=lambda *event: heard.append(event)))
    assert [event for event in heard if event[0] == "denoise"] == [("denoise", step, 5) for step in range(1, 6)]
    assert heard[0][0] == "encode" and heard[-1] == ("decode", 9, 9)


def test_a_step_takes_the_time_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(backend.time, "sleep", slept.append)
    _frames(_request(params={"step_seconds": 0.25}))
    assert slept == [0.25] * 4


def test_a_cancel_is_heard_between_two_steps() -> None:
    steps: list[int] = []
    hooks = Hooks(progress=lambda stage, step, total: steps.append(step), cancelled=lambda: 2 in steps)
    with pytest.raises(Cancelled):
        _frames(_request(num_inference_steps=50), hooks)
    assert max(steps) == 2


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        ("item", ItemError, "asked to fail"),
        ("nan", ItemError, "not finite"),
        ("capacity", CapacityError, "out of memory"),
    ],
)
def test_a_failure_that_was_asked_for_comes_as_its_class(fail: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        _frames(_request(params={"fail": fail}))


def test_a_black_card_is_black() -> None:
    assert not _frames(_request(params={"fail": "black"})).any()


def test_a_crash_is_the_death_of_the_process() -> None:
    code = (
        "from tests.models.testcard.test_testcard import _frames, _request;"
        "_frames(_request(params={'fail': 'crash'})); print('alive')"
    )
    root = Path(__file__).parents[3]
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert dead.returncode == -9 and "alive" not in dead.stdout


def test_a_hang_neither_ends_nor_reports() -> None:
    heard: list[tuple[str, int, int]] = []
    hooks = Hooks(progress=lambda *event: heard.append(event), cancelled=lambda: False)
    request = _request(num_inference_steps=2, params={"fail": "hang"})
    thread = threading.Thread(target=_frames, args=(request, hooks), daemon=True)
    thread.start()
    thread.join(0.3)  # without the hang it takes milliseconds
    assert thread.is_alive() and heard[-1] == ("denoise", 1, 2)


def test_a_share_of_the_items_fails_and_always_the_same_ones() -> None:
    def chosen(share: float) -> set[int]:
        params = {"fail": "item", "fail_share": share}
        return {seed for seed in range(400) if spec.fails(_request(seed=seed, params=params))}

    # 400 draws of 1 in 4: 100, give or take four standard deviations of 8.7.
    assert 65 <= len(chosen(0.25)) <= 135 and chosen(0.25) < chosen(0.5)
    assert len(chosen(0.0)) == 0 and len(chosen(1.0)) == 400


def test_ready_bytes_are_made_once_and_are_a_whole_video(tmp_path: Path) -> None:
    engine = backend.load()
    requests = [_request(seed=seed, params={"ready": True}) for seed in (1, 2)]
    videos: list[Video] = [next(iter(engine.generate([request], Hooks()))) for request in requests]
    assert videos[0].encoded is not None and videos[0].encoded is videos[1].encoded
    encoded = media.write(videos[0], tmp_path / "card.mp4")
    assert (encoded.frames, encoded.height, encoded.width, encoded.fps) == (9, 64, 64, 8.0)


def test_cards_that_differ_in_shape_or_steps_or_knobs_share_no_batch() -> None:
    params = spec.read({})
    keys = {
        spec.batch_key(request, params)
        for request in (
            _request(),
            _request(height=128),
            _request(num_frames=5),
            _request(num_inference_steps=9),
            _request(params={"step_seconds": 1.0}),
        )
    }
    assert len(keys) == 5
    assert spec.batch_key(_request(), params) == spec.batch_key(replace(_request(seed=3), prompt="x"), params)
    assert spec.tokens(_request(num_frames=17), params) == 5 * 4 * 4
