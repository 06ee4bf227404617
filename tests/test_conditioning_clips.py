"""Videos as conditioning: files of ffmpeg, zips and folders of frames, with exactly as many frames as the request."""

from __future__ import annotations

import io
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vidgen import conditioning, media
from vidgen.conditioning import clips, limits
from vidgen.errors import ItemError
from vidgen.types import Media, Request

HEIGHT, WIDTH, FRAMES = 48, 64, 5
REQUEST = Request("v2v", "p", "", 1, HEIGHT, WIDTH, FRAMES, 8.0, 1, 1.0, "x")
# Mean distance (of 255) of a crf 1 file from its frames: rounding of the colour conversion both ways, halved chroma.
NEAR = 3.0


def shots(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [np.stack([x * 2 + k * 20, y * 3, np.full_like(x, 40 * k)], -1) for k in range(count)]
    return np.stack(planes).clip(0, 255).astype(np.uint8)


def write(place: Path, frames: np.ndarray, **options: Any) -> Path:
    format = {".mp4": "mp4", ".webm": "webm", ".gif": "gif", ".zip": "png"}[place.suffix]
    encoder = media.start(place, frames.shape[1:3], options.pop("fps", 8.0), format=format, crf=1)
    encoder.frames(frames)
    return encoder.finish().path


def ffmpeg(*arguments: str) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def video(place: Path | str, **changes: Any) -> np.ndarray:
    read = conditioning.read(replace(REQUEST, video=Media(str(place), ""), **changes)).video
    assert read is not None and read.dtype == np.uint8
    return read


def refused(place: Path | str, **changes: Any) -> str:
    with pytest.raises(ItemError) as caught:
        video(place, **changes)
    message = str(caught.value)
    assert message.startswith("video: ")
    return message


def distance(read: np.ndarray, frames: np.ndarray) -> float:
    return float(np.abs(read.astype(int) - frames).mean())


# ---------------------------------------------------------------- video files


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.zip"])
def test_what_this_program_writes_can_be_its_input(name: str, tmp_path: Path) -> None:
    read = video(write(tmp_path / name, shots()))
    assert read.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert distance(read, shots()) <= (0 if name == "clip.zip" else 8 if name == "clip.gif" else NEAR)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.zip"])
def test_bytes_are_read_as_a_file_is_and_leave_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write(tmp_path / name, shots())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    read = conditioning.read(replace(REQUEST, video=Media("", "", place.read_bytes()))).video
    assert read is not None and np.array_equal(read, video(place)) and list(scratch.iterdir()) == []


@pytest.mark.parametrize("fps", [1000 / 1001, 7.3, 23.976, 120.0])
def test_no_frame_is_dropped_or_repeated_for_a_rate(fps: float, tmp_path: Path) -> None:
    assert distance(video(write(tmp_path / "clip.mp4", shots(), fps=fps)), shots()) <= NEAR


def test_a_variable_frame_rate_gives_the_frames_that_are_stored(tmp_path: Path) -> None:
    write(tmp_path / "all.mp4", shots(15), fps=30.0)
    kept = [0, 1, 4, 9, 14]
    chosen = "+".join(f"eq(n,{number})" for number in kept)
    ffmpeg("-i", str(tmp_path / "all.mp4"), "-vf", f"select='{chosen}'", "-fps_mode", "vfr", str(tmp_path / "vfr.mp4"))
    # Encoded twice, the second time at ffmpeg's default quality.
    assert distance(video(tmp_path / "vfr.mp4"), shots(15)[kept]) <= 2 * NEAR


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_a_turned_video_is_upright(degrees: int, turns: int, tmp_path: Path) -> None:
    lying = np.rot90(shots(), -turns, axes=(1, 2))
    write(tmp_path / "lying.mp4", np.ascontiguousarray(lying))
    ffmpeg("-display_rotation", str(degrees), "-i", str(tmp_path / "lying.mp4"), "-c", "copy", str(tmp_path / "up.mp4"))
    assert distance(video(tmp_path / "up.mp4"), shots()) <= NEAR


def test_sound_and_a_cover_picture_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "silent.mp4", shots())
    Image.new("RGB", (32, 32)).save(tmp_path / "cover.png")
    inputs = ["-i", str(tmp_path / "cover.png"), "-i", str(tmp_path / "silent.mp4"), "-f", "lavfi", "-i", "sine=d=0.5"]
    maps = ["-map", "0", "-map", "1", "-map", "2", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
    ffmpeg(*inputs, *maps, str(tmp_path / "clip.mp4"))
    assert distance(video(tmp_path / "clip.mp4"), shots()) <= NEAR


def test_a_transparent_video_is_over_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0)) for _ in range(FRAMES)]
    for number, frame in enumerate(frames):
        frame.paste((200, 0, 0, 255), (0, 0, 10 + number, HEIGHT))
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], disposal=2)
    read = video(tmp_path / "clip.gif")
    assert (read[:, :, 30:] == 255).all() and np.abs(read[:, :, :10].astype(int) - (200, 0, 0)).max() <= 2


def test_a_video_is_resized_frame_by_frame_as_an_image_is(tmp_path: Path) -> None:
    place = write(tmp_path / "clip.zip", shots(height=96, width=80))
    for how in ("cover", "contain"):
        read = video(place, resize=how)
        for number, frame in enumerate(shots(height=96, width=80)):
            still = io.BytesIO()
            Image.fromarray(frame).save(still, "PNG")
            request = replace(REQUEST, image=Media("", "", still.getvalue()), resize=how)
            image = conditioning.read(request).image
            assert image is not None and np.array_equal(read[number], image)
    assert "is 96x80 (height x width), not 48x64" in refused(place)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.zip"])
@pytest.mark.parametrize("count", [1, FRAMES - 1, FRAMES + 1, 4 * FRAMES])
def test_another_number_of_frames_is_refused_with_both(name: str, count: int, tmp_path: Path) -> None:
    message = refused(write(tmp_path / name, shots(count)))
    seen = f"has {FRAMES + 1} frames or more" if count > FRAMES and name != "clip.zip" else f"has {count} frames"
    assert f"{seen}; num_frames is {FRAMES}" in message


def test_ffmpeg_is_stopped_after_one_frame_too_many(tmp_path: Path) -> None:
    place = write(tmp_path / "clip.mp4", shots(60))
    read = media.read_video(place, 4, limits.PIXELS)
    assert sum(1 for _ in read) == 4


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.zip"])
@pytest.mark.parametrize("share", [0.02, 0.6, 0.97])
def test_a_cut_video_is_refused(name: str, share: float, tmp_path: Path) -> None:
    whole = write(tmp_path / name, shots()).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    assert str(tmp_path / "cut") in refused(tmp_path / "cut")


def test_damage_inside_a_video_is_refused(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "clip.mp4", shots()).read_bytes())
    start = data.index(b"mdat")
    for place in range(start + 200, len(data), 50):
        data[place] ^= 0xFF
    (tmp_path / "bad.mp4").write_bytes(data)
    assert "could not be decoded" in refused(tmp_path / "bad.mp4")


@pytest.mark.parametrize("content", [b"", b"no video", b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"])
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8"])
def test_what_is_no_video_is_refused_a_playlist_too(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "could not be decoded" in refused(tmp_path / name)


def test_a_list_of_other_files_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", shots())
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    assert "could not be decoded" in refused(tmp_path / "list.mp4")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.5", str(tmp_path / "clip.mp4"))
    assert "holds no video stream" in refused(tmp_path / "clip.mp4")


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clip.mp4", "clip.zip"):
        place = write(tmp_path / name, shots())
        monkeypatch.setattr(clips, "PIXELS", HEIGHT * WIDTH - 1)
        monkeypatch.setattr("vidgen.conditioning.pictures.PIXELS", HEIGHT * WIDTH - 1)
        assert "pixels" in refused(place), name


def test_a_size_that_changes_on_the_way_is_refused(tmp_path: Path) -> None:
    for name, size in (("a", "64x48"), ("b", "96x64")):
        source = ["-f", "lavfi", "-i", f"testsrc=size={size}:rate=8:d=0.5", "-pix_fmt", "yuv420p", "-bf", "0"]
        ffmpeg(*source, "-f", "h264", str(tmp_path / f"{name}.h264"))
    joined = (tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes()
    (tmp_path / "ab.h264").write_bytes(joined)
    ffmpeg("-framerate", "8", "-i", str(tmp_path / "ab.h264"), "-c", "copy", str(tmp_path / "ab.avi"))
    assert "frames of different sizes: [(48, 64), (64, 96)]" in refused(tmp_path / "ab.avi", num_frames=8)


def test_many_videos_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    places = [write(tmp_path / f"{k}.mp4", shots() + np.uint8(k)) for k in range(4)]
    alone = [video(place) for place in places]
    together: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda k=k: together.setdefault(k, video(places[k]))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(together[k], alone[k]) for k in range(4))


# ---------------------------------------------------------------- zips and folders of frames


def frames_as(folder: Path, names: list[str], frames: np.ndarray) -> Path:
    folder.mkdir()
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(folder / name)
    return folder


def zipped(folder: Path, place: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, prefix + file.name)
    return place


def test_a_folder_and_a_zip_of_anyones_frames_are_a_video_in_the_order_of_counting(tmp_path: Path) -> None:
    names = [f"frame{number}.PNG" for number in (1, 2, 9, 10, 100)]
    folder = frames_as(tmp_path / "frames", names, shots())
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame1.png").write_bytes(b"what a Mac leaves")
    assert np.array_equal(video(folder), shots()) and np.array_equal(video(f"{folder}/"), shots())
    zipped(folder, tmp_path / "frames.zip", "some folder/")
    with zipfile.ZipFile(tmp_path / "frames.zip", "a") as archive:
        archive.writestr("__MACOSX/some folder/._frame1.png", b"and puts into zips")
    assert np.array_equal(video(tmp_path / "frames.zip"), shots())


def test_frames_may_be_of_sixteen_bits_or_transparent(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(FRAMES):
        Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0)).save(folder / f"{number}.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 257 * 100, np.uint16)).save(folder / "0.png")
    read = video(folder)
    assert (read[0] == 100).all() and (read[1:] == 255).all()


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = frames_as(tmp_path / "frames", [f"{n}.png" for n in range(FRAMES)], shots())
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(folder / "3.png")
    message = refused(folder, resize="cover")
    assert "has frames of different sizes: 48x64, and 49x64 for frame 3" in message


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    folder = frames_as(tmp_path / "frames", [f"{n}.png" for n in range(FRAMES)], shots())
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-100])
    assert "frame 2 (" in refused(folder) and "or is damaged" in refused(folder)
    assert "frame 2.png " in refused(zipped(folder, tmp_path / "frames.zip"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_frames_that_are_not_there_are_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    place = folder if kind == "folder" else zipped(folder, tmp_path / "frames.zip")
    assert "without .png frames" in refused(place)


def test_a_zip_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "clip.zip", shots()).read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(data)
    assert "frame 00000.png is damaged: Bad CRC-32" in refused(tmp_path / "bad.zip")


def test_a_frame_that_unpacks_to_too_much_is_refused_by_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(FRAMES):
            archive.writestr(f"{number}.png", bytes(1 << 20))
    monkeypatch.setattr(clips, "IMAGE_BYTES", 1 << 19)
    assert "frame 0.png has 1,048,576 bytes; allowed: at most 524,288" in refused(tmp_path / "bomb.zip")


def test_a_frame_that_unpacks_to_more_than_it_declares_is_refused(tmp_path: Path) -> None:
    """What unpacks to a megabyte says that it is 100 bytes, here and in the directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(FRAMES):
            archive.writestr(f"{number}.png", bytes(1 << 20))
    liar = buffer.getvalue().replace((1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    (tmp_path / "liar.zip").write_bytes(liar)
    assert "frame 0.png is damaged" in refused(tmp_path / "liar.zip")


def test_a_zip_of_more_files_than_any_clip_has_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write(tmp_path / "clip.zip", shots())
    monkeypatch.setattr(zipfile, "ZipFile", lambda *rest: pytest.fail("it was opened"))
    monkeypatch.setattr(clips, "ENTRIES", FRAMES - 1)
    assert "is a zip of 5 files" in refused(place)
    monkeypatch.setattr(clips, "ENTRIES", limits.ENTRIES)
    monkeypatch.setattr(clips, "DIRECTORY_BYTES", 10)
    assert "with a directory of" in refused(place)


def test_a_zip64_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "clip.zip", shots()).read_bytes()
    end = data.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + bytes(16)
    (tmp_path / "large.zip").write_bytes(data[:end] + locator + data[end:])
    assert "is a zip64" in refused(tmp_path / "large.zip")
