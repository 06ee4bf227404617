"""Frames to files and back, with the real ffmpeg."""

from __future__ import annotations

import hashlib
import io
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen import formats, media
from vidgen.errors import InfrastructureError, ItemError, UserError
from vidgen.media import writing
from vidgen.types import Request, Video

# Mean distance (of 255) from the raw frames a format may have: lossless; halved chroma and crf 18; 256 colours a frame.
DISTANCE = {"mp4": 3.0, "webm": 3.0, "gif": 5.0, "png": 0.0}


def _frames(count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [np.stack([(x * 3 + k * 9) % 256, y * 5 % 256, np.full_like(x, 20 * k)], -1) for k in range(count)]
    return np.stack(planes).astype(np.uint8)


def _video(frames: np.ndarray, fps: float = 8.0, chunk: int = 4) -> Video:
    count, height, width, _ = frames.shape
    request = Request("t2v", "p", "", 1, height, width, count, fps, 1, 1.0, "x")
    return Video(request, (frames[k : k + chunk] for k in range(0, count, chunk)), "uint8")


def _path(folder: Path, format: str, name: str = "clip") -> Path:
    return folder / f"{name}{formats.FORMATS[format].extension}"


@pytest.mark.parametrize("format", formats.FORMATS)
def test_frames_come_back_as_they_went_in(format: str, tmp_path: Path) -> None:
    frames = _frames()
    encoded = media.write(_video(frames), _path(tmp_path, format), format=format)
    back = media.read_frames(encoded.path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).mean() <= DISTANCE[format]
    # The first frame is not shifted by one: it is nearer to the first raw frame than to the second.
    near, far = (np.abs(back[0].astype(int) - frames[k]).mean() for k in (0, 1))
    assert near < far


@pytest.mark.parametrize("format", formats.FORMATS)
def test_equal_frames_give_equal_bytes_however_they_are_chunked(format: str, tmp_path: Path) -> None:
    frames = _frames()
    one = media.write(_video(frames, chunk=9), _path(tmp_path, format, "one"), format=format)
    two = media.write(_video(frames, chunk=2), _path(tmp_path, format, "two"), format=format)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.sha256 == two.sha256 == hashlib.sha256(one.path.read_bytes()).hexdigest()
    assert one.bytes == one.path.stat().st_size


def test_h265_gives_equal_bytes_too(tmp_path: Path) -> None:
    frames = _frames(height=64, width=64)
    files = [media.write(_video(frames), tmp_path / name, codec="libx265") for name in ("a.mp4", "b.mp4")]
    assert files[0].sha256 == files[1].sha256
    assert media.probe(files[0].path).codec == "hevc"


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize(("count", "fps"), [(1, 8.0), (9, 8.0), (12, 24.0)])
def test_a_probe_counts_what_can_be_decoded(format: str, count: int, fps: float, tmp_path: Path) -> None:
    encoded = media.write(_video(_frames(count), fps), _path(tmp_path, format), format=format)
    seen = media.probe(encoded.path)
    assert (seen.frames, seen.height, seen.width) == (count, 48, 64) == (encoded.frames, 48, 64)
    # gif stores delays in 1/100 s, so a rate is met only on average.
    assert seen.fps == pytest.approx(fps, rel=0.05 if format == "gif" else 1e-3)
    assert seen.duration == pytest.approx(count / fps, rel=0.05 if format == "gif" else 1e-3)


def test_a_rate_that_is_no_whole_number_is_kept(tmp_path: Path) -> None:
    encoded = media.write(_video(_frames(), 23.976), tmp_path / "clip.mp4")
    assert media.probe(encoded.path).fps == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_frames_that_stand_still_are_kept_one_by_one(format: str, tmp_path: Path) -> None:
    frames = np.repeat(_frames(1), 9, axis=0)
    encoded = media.write(_video(frames), _path(tmp_path, format), format=format)
    assert media.probe(encoded.path).frames == 9


@pytest.mark.parametrize("format", ["webm", "gif", "png"])
def test_odd_sizes_keep_their_size(format: str, tmp_path: Path) -> None:
    encoded = media.write(_video(_frames(height=33, width=51)), _path(tmp_path, format), format=format)
    seen = media.probe(encoded.path)
    assert (seen.height, seen.width) == (33, 51)
    assert media.read_frames(encoded.path).shape == (9, 33, 51, 3)


def test_odd_sizes_in_mp4_are_refused_by_name_and_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"33x51.*even sizes.*webm, gif, png"):
        media.write(_video(_frames(height=33, width=51)), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_mp4_can_start_before_it_is_whole(tmp_path: Path) -> None:
    data = media.write(_video(_frames()), tmp_path / "clip.mp4").path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("avi", None, 18, (48, 64), 8.0), "output.format: 'avi'.*mp4, webm, gif, png"),
        (("mp4", "libvpx-vp9", 18, (48, 64), 8.0), "output.codec: 'libvpx-vp9'.*libx264"),
    ],
)
def test_a_format_or_codec_that_does_not_exist_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        formats.problems(*arguments)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("mp4", None, 0, (48, 64), 8.0), "crf: 0"),
        (("mp4", None, 18, (0, 64), 8.0), "0x64"),
        (("gif", None, 18, (48, 64), 60.0), "fps: 60"),
        (("mp4", None, 18, (48, 64), 0.0), "fps: 0"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_anything_is_made(arguments: tuple, word: str) -> None:
    assert any(word in problem for problem in formats.problems(*arguments))


@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_default_of_every_format_has_no_problem(format: str) -> None:
    assert formats.problems(format, None, 18, (480, 832), 16.0) == []


@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_flat_clip_is_constant_even_with_a_little_noise(level: int, tmp_path: Path) -> None:
    frames = np.full((5, 48, 64, 3), level, np.uint8)
    frames[2, 3, 3] = level - 1 if level else 1
    encoded = media.write(_video(frames), tmp_path / "clip.mp4")
    assert encoded.constant
    assert encoded.mean == pytest.approx(level, abs=0.5)  # one pixel of 3072 is off by one


def test_one_small_thing_in_one_frame_is_not_constant(tmp_path: Path) -> None:
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[4, 11:14, 21:24] = (0, 0, 60)
    assert not media.write(_video(frames), tmp_path / "clip.mp4").constant


def test_an_encoder_may_be_finished_in_another_thread(tmp_path: Path) -> None:
    frames = _frames()
    encoder = media.start(tmp_path / "clip.mp4", (48, 64), 8.0)
    encoder.frames(frames[:5])
    encoder.frames(frames[5:])
    done: list[media.Encoded] = []
    thread = threading.Thread(target=lambda: done.append(encoder.finish()))
    thread.start()
    thread.join()
    assert done[0].frames == 9 and media.probe(done[0].path).frames == 9


@pytest.mark.parametrize(
    "chunk",
    [
        np.zeros((2, 48, 63, 3), np.uint8),
        np.zeros((2, 48, 64, 3), np.float32),
        np.zeros((48, 64, 3), np.uint8),
    ],
)
def test_frames_of_another_shape_are_an_item_error(chunk: np.ndarray, tmp_path: Path) -> None:
    encoder = media.start(tmp_path / "clip.mp4", (48, 64), 8.0)
    with pytest.raises(ItemError, match=r"expected uint8 \[f, 48, 64, 3\]"):
        encoder.frames(chunk)
    encoder.abort()


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_an_error_among_the_chunks_leaves_no_file(format: str, tmp_path: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield _frames(3)
        raise ItemError("latents are not finite")

    video = _video(_frames())
    video.chunks = chunks()
    with pytest.raises(ItemError, match="not finite"):
        media.write(video, _path(tmp_path, format), format=format)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_at_all_are_an_item_error(tmp_path: Path) -> None:
    video = _video(_frames())
    video.chunks = iter(())
    with pytest.raises(ItemError, match="no frames"):
        media.write(video, tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_ffmpeg_that_cannot_write_is_an_item_error_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="No such file or directory"):
        media.write(_video(_frames(40)), tmp_path / "missing" / "clip.mp4")


def test_an_ffmpeg_that_is_killed_says_nothing_about_the_item(tmp_path: Path) -> None:
    encoder = media.start(tmp_path / "clip.mp4", (48, 64), 8.0)
    encoder.frames(_frames())
    encoder._sink._process.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(InfrastructureError, match="exit status -9"):
        encoder.finish()
    encoder.abort()


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_cut_file_is_an_item_error(format: str, share: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)
    whole = media.write(_video(noisy), _path(tmp_path, format), format=format).path.read_bytes()
    cut = _path(tmp_path, format, "cut")
    cut.write_bytes(whole[: int(len(whole) * share)])
    try:
        frames = media.probe(cut).frames
    except ItemError as error:
        assert "cut" in str(error)
    else:
        assert format == "webm" and frames < 9  # a webm may end between two frames: then the count tells


def test_damage_inside_the_picture_is_an_item_error(tmp_path: Path) -> None:
    whole = media.write(_video(_frames()), tmp_path / "clip.mp4").path.read_bytes()
    at = whole.index(b"mdat") + 900
    (tmp_path / "bad.mp4").write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
    with pytest.raises(ItemError, match="could not be decoded"):
        media.probe(tmp_path / "bad.mp4")


def test_what_is_no_video_is_an_item_error_without_addresses(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(ItemError) as caught:
        media.probe(tmp_path / "clip.mp4")
    assert "moov atom not found" in str(caught.value) and "0x" not in str(caught.value)
    with pytest.raises(ItemError, match="no such file"):
        media.probe(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_poster_is_the_middle_frame(format: str, tmp_path: Path) -> None:
    frames = np.zeros((9, 48, 64, 3), np.uint8)
    frames[:, :, :, 2] = 30
    frames[4, :, :32] = (250, 250, 250)
    encoded = media.write(_video(frames), _path(tmp_path, format), format=format)
    with Image.open(io.BytesIO(media.poster(encoded.path))) as picture:
        assert picture.format == "JPEG" and picture.size == (64, 48)
        pixels = np.asarray(picture.convert("L"))
    assert pixels[:, :24].mean() > 200 and pixels[:, 40:].mean() < 50


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_poster_is_no_wider_than_asked_and_keeps_its_proportions(format: str, tmp_path: Path) -> None:
    encoded = media.write(_video(_frames(2, 48, 160)), _path(tmp_path, format), format=format)
    with Image.open(io.BytesIO(media.poster(encoded.path, width=80))) as picture:
        assert picture.size == (80, 24)


def test_a_zip_of_frames_is_an_ordinary_zip_without_a_clock(tmp_path: Path) -> None:
    frames = _frames(3)
    encoded = media.write(_video(frames, 12.0), tmp_path / "clip.zip", format="png")
    with zipfile.ZipFile(encoded.path) as archive:
        assert archive.namelist() == ["00000.png", "00001.png", "00002.png"]
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert media.probe(encoded.path).fps == 12.0


def test_ready_bytes_are_adopted_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = media.write(_video(_frames(7)), tmp_path / "made.mp4")
    video = _video(_frames(7))
    video.encoded = made.path.read_bytes()
    first = media.write(video, tmp_path / "first.mp4")
    assert (first.sha256, first.frames, first.width, first.fps) == (made.sha256, 7, 64, 8.0)
    assert first.path.read_bytes() == video.encoded and not first.constant

    def never(path: Path) -> media.Probe:
        raise AssertionError("equal bytes were decoded twice")

    monkeypatch.setattr(writing, "probe", never)
    assert media.write(video, tmp_path / "second.mp4").path == tmp_path / "second.mp4"


def test_ready_bytes_of_another_format_or_of_nothing_are_refused(tmp_path: Path) -> None:
    made = media.write(_video(_frames(3)), tmp_path / "made.webm", format="webm").path.read_bytes()
    with pytest.raises(ItemError, match="vp9, which is not mp4"):
        media.adopt(made, tmp_path / "clip.mp4")
    with pytest.raises(ItemError):
        media.adopt(b"", tmp_path / "clip.mp4")
    assert not (tmp_path / "clip.mp4").exists()
