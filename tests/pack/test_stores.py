"""From one store into another."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from tests.pack.conftest import DONE, tree
from tests.store.conftest import moto, s3, s3_at  # noqa: F401
from vidgen.pack import job, source
from vidgen.pack.options import options
from vidgen.store.objects import Objects


def copied(folder: str, url: str) -> str:
    objects = Objects(url)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            objects.put(str(path.relative_to(folder)), path.read_bytes())
    return url


def test_a_pack_in_a_bucket_or_in_memory_is_the_one_on_a_disk(
    finished: str,
    tmp_path: Path,
    s3: str,  # noqa: F811
) -> None:
    wanted = options("webdataset", shard_size="30KB", split="train=0.5,test=0.5")
    job.pack(source.of_run(finished), str(tmp_path / "disk"), wanted)
    on_disk = tree(tmp_path / "disk")
    run = copied(finished, f"{s3}/run")
    for dest in (f"{s3}/pack", f"memory://{uuid.uuid4().hex}"):
        first = job.pack(source.of_run(run), dest, wanted)
        assert first.videos == DONE and first.kept == 0
        objects = Objects(dest)
        assert {entry.path: objects.read(entry.path) for entry in objects.list("")} == on_disk
        again = job.pack(source.of_run(run), dest, wanted)
        assert (again.made, again.kept) == (0, first.made)
    shutil.rmtree(tmp_path / "disk")
