"""A process killed in the middle of an upload in parts: nothing is there, or all of it, and the next one puts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from tests.crash import points
from vidgen import faults
from vidgen.store import s3 as stores
from vidgen.store.objects import Objects

ROOT = Path(__file__).parents[2]
PUT = """
import sys
from vidgen.store.objects import Objects
Objects(sys.argv[1]).put_file("data/video", sys.argv[2])
"""
PARTS = 3


def test_an_upload_killed_at_any_point_leaves_nothing_or_everything_and_is_made_again(s3: str, tmp_path: Path) -> None:
    source, objects = tmp_path / "video", Objects(s3)
    data = os.urandom(1 << 16) * (PARTS * stores.PART_BYTES >> 16)
    source.write_bytes(data)
    hits: Counter[str] = Counter()
    for point in points.by_file()["store/s3.py"]:
        for count in range(1, PARTS + 1) if point.startswith("upload part") else (1,):
            environment = {
                **os.environ,
                "FSSPEC_S3": json.dumps(fsspec.config.conf["s3"]),
                "PYTHONPATH": str(ROOT),
                faults.VARIABLE: f"{point}:{count}:kill",
            }
            command = [sys.executable, "-c", PUT, s3, str(source)]
            killed = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
            assert killed.returncode == -9, (point, killed.stderr.decode())
            hits[point] += 1
            whole = point == "upload ended.after"
            assert objects.size("data/video") == (len(data) if whole else None), point
            assert [entry.path for entry in objects.list("data")] == (["data/video"] if whole else [])
            objects.put_file("data/video", source)
            assert objects.read("data/video") == data, point
            objects.delete("data/video")
    print(f"\nuploads killed: {dict(hits)}")
    assert set(hits) == {point for point in points.all_points() if point.startswith("upload")}


def test_a_part_that_cannot_be_sent_leaves_no_unfinished_upload(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, objects = tmp_path / "video", Objects(s3)
    source.write_bytes(b"x" * PARTS * stores.PART_BYTES)
    monkeypatch.setenv(faults.VARIABLE, "upload part.before:2:EIO")
    monkeypatch.setattr(faults, "_reached", Counter())
    with pytest.raises(OSError, match="Input/output error"):
        objects.put_file("data/video", source)
    bucket = objects.root.split("/", 1)[0]
    assert not objects.exists("data/video")
    assert not fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
