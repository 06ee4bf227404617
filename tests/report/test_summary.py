"""Failures grouped by what they have in common, and totals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from vidgen.report.summary import Summary, signature


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("the file holds 9 frames of (64, 64)", "the file holds 17 frames of (480, 832)"),
        ("out of memory at 0x7ffee3 after 1.5e-3 s", "out of memory at 0x55d0c3 after 12.25 s"),
        ("/tmp/vidgen-0/a_12/x.mp4 could not be decoded", "/scratch/b/y.mp4 could not be decoded"),
        ("s3://bucket/run/a.parquet row 7", "s3://other/run/b.parquet row 1,024"),
        ("item 0123456789abcdef01234567 is bad", "item ffffffffffffffff00000000 is bad"),
        ("a  b\nc", "a b c"),
    ],
)
def test_failures_that_differ_in_numbers_ids_and_paths_are_one(one: str, other: str) -> None:
    assert signature("item", one) == signature("item", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("latents are not finite", "every frame is flat"), ("weights are fp32", "weights are bf16"), ("", "x")],
)
def test_failures_that_differ_in_words_are_two(one: str, other: str) -> None:
    assert signature("item", one) != signature("item", other)


def test_equal_words_of_another_class_are_another_failure() -> None:
    assert signature("item", "gone") != signature("infrastructure", "gone")


def test_a_signature_is_readable_and_short() -> None:
    assert signature("item", "the file holds 9 frames of (64, 64)") == "item: the file holds # frames of (#, #)"
    assert len(signature("item", "word " * 1000)) < 200


def _row(status: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "item_id": "i", "row_id": "r", "prompt": "p", **more}


def test_a_failure_of_a_megabyte_is_signed_at_once() -> None:
    """A rejection may quote a cell: time that grows with the square of its letters would be hours."""
    assert signature("item", "x" * 1_000_000) == "item: " + "x" * 160


def test_totals_count_every_row_once_and_videos_alone_as_footage() -> None:
    summary = Summary()
    made = {"num_frames": 16, "fps": 8.0, "width": 64, "height": 48, "bytes": 100, "node": "n"}
    for created, seconds in ((10.0, 1.0), (14.0, 3.0)):
        times = {"encode_s": 0.0, "denoise_s": seconds, "decode_s": 0.5, "write_s": None, "created_at": created}
        summary.add(_row("done", **made, **times))
    summary.add(_row("failed", error_class="item", error="broken 1", num_frames=16, fps=8.0))
    summary.add(_row("failed", error_class="item", error="broken 2", num_frames=16, fps=8.0))
    summary.add(_row("rejected", error_class="rejected", error="height is 7"))
    summary.add(_row("pending"))
    assert summary.items == 6 and dict(summary.statuses) == {"done": 2, "failed": 2, "rejected": 1, "pending": 1}
    assert (summary.frames, summary.video_seconds, summary.bytes) == (32, 4.0, 200)
    spread = summary.stages["denoise"]
    assert (spread.count, spread.mean, spread.least, spread.most, spread.total) == (2, 2.0, 1.0, 3.0, 4.0)
    assert summary.stages["write"].count == 0
    assert (summary.first_at, summary.last_at) == (10.0, 14.0)
    assert [(group.signature, group.count, group.error) for group in summary.failures()] == [
        ("item: broken #", 2, "broken 1"),
        ("rejected: height is #", 1, "height is 7"),
    ]
    assert [group.number for group in summary.failures()] == [0, 1]


def test_the_driver_can_sign_failures_without_loading_anything_heavy() -> None:
    code = (
        "import sys, vidgen.report.summary as s; s.signature('item', 'x');"
        "print([m for m in ('torch', 'pyarrow', 'numpy', 'jinja2', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
