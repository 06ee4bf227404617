"""A checkpoint folder is read, hashed and fetched alike wherever it lies, and what is wrong with it is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from vidgen.checkpoint.digest import BLOCK_BYTES
from vidgen.checkpoint.fetch import fetch, fetched
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError

IMPORTS = """
import sys
from vidgen.checkpoint.fetch import fetch
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(place: Path, content: Any) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A two-component checkpoint: a sharded transformer of about 160 KB, a tokenizer."""
    place = tmp_path / "checkpoint"
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "X"], "tokenizer": ["transformers", "T"]}
    write(place / "model_index.json", index | {"transformer_2": [None, None], "boundary_ratio": None})
    write(place / "transformer/config.json", {"width": 3})
    write(place / "tokenizer/tokenizer_config.json", {"model_max_length": 512})
    write(place / "tokenizer/tokenizer.json", {"vocab": ["a"]})
    weights = {f"w{k}": torch.randn(100, 100, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    shards = {"w0": "a", "w1": "a", "w2": "b", "w3": "b"}
    names = {
        "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    for shard, name in names.items():
        save_file({k: weights[k] for k, s in shards.items() if s == shard}, place / "transformer" / name)
    write(
        place / "transformer/diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {key: names[shard] for key, shard in shards.items()}},
    )
    return place


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/checkpoint", recursive=True)
    yield "memory://bucket/checkpoint"
    memory.rm("/bucket", recursive=True)


def change(place: Path, position: int) -> None:
    content = bytearray(place.read_bytes())
    content[position] ^= 1
    place.write_bytes(bytes(content))


def test_configs_hold_each_component_and_the_index_but_no_component_that_is_null(folder: Path) -> None:
    configs = open_checkpoint(str(folder)).configs()
    assert set(configs) == {"model_index", "transformer", "tokenizer", "stored"}
    assert configs["stored"] == {"transformer": "float32"}
    assert configs["transformer"] == {"width": 3}
    assert configs["tokenizer"] == {"model_max_length": 512}
    write(folder / "vidgen.json", {"dtype": "float32"})
    assert open_checkpoint(str(folder)).configs()["vidgen"] == {"dtype": "float32"}


def test_a_folder_is_the_same_in_every_place(folder: Path, in_memory: str) -> None:
    here, there = open_checkpoint(str(folder)), open_checkpoint(in_memory)
    assert here.hash() == there.hash()
    assert here.configs() == there.configs()
    assert here.files("transformer") == there.files("transformer")
    assert here.resolved.name == str(folder)
    assert there.resolved.name == "memory:///bucket/checkpoint"


def test_a_snapshot_of_links_is_the_folder_it_links_to(folder: Path, tmp_path: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            link = tmp_path / "snapshot" / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    linked = open_checkpoint(str(tmp_path / "snapshot"))
    assert linked.hash() == open_checkpoint(str(folder)).hash()


@pytest.mark.parametrize(
    "path",
    ["model_index.json", "transformer/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"],
)
def test_the_hash_changes_with_a_config_and_with_the_tokenizer(folder: Path, path: str) -> None:
    before = open_checkpoint(str(folder)).hash()
    (folder / path).write_text((folder / path).read_text().replace("}", ', "x": 1}', 1))
    assert open_checkpoint(str(folder)).hash() != before


def test_the_hash_changes_with_the_weights_of_any_shard(folder: Path) -> None:
    # 64 blocks of 4 KiB cover nearly all of 80 KB, so a handful of single flipped bits cannot all hide.
    before = open_checkpoint(str(folder)).hash()
    for shard in sorted((folder / "transformer").glob("*.safetensors")):
        original = shard.read_bytes()
        noticed = 0
        for position in range(2000, len(original), 8000):
            change(shard, position)
            noticed += open_checkpoint(str(folder)).hash() != before
            shard.write_bytes(original)
        assert noticed >= 8


def test_the_hash_reads_little_of_a_large_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(4_000_000)}, folder / "transformer/model.safetensors")
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(str(folder))
    read = 0
    original = checkpoint.fs.cat_file

    def counted(path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        nonlocal read
        content = original(path, start, end, **kwargs)
        read += len(content)
        return content

    monkeypatch.setattr(checkpoint.fs, "cat_file", counted)
    checkpoint.hash()
    assert 60 * BLOCK_BYTES < read < 70 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        ("model_index.json", "model_index.json"),
        ("transformer/config.json", "component transformer"),
        ("tokenizer", "component tokenizer"),
    ],
)
def test_a_missing_part_is_named(folder: Path, remove: str, named: str) -> None:
    place = folder / remove
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(str(folder)).configs()


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing"):
        open_checkpoint(str(folder)).hash()


def test_an_index_that_leads_out_of_its_folder_is_refused(folder: Path) -> None:
    write(folder / "transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"w": "../x"}})
    with pytest.raises(CheckpointError, match=r"w into '\.\./x'"):
        open_checkpoint(str(folder)).weights("transformer")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_by_name(folder: Path, name: str) -> None:
    for file in (folder / "transformer").glob("*safetensors*"):
        file.unlink()
    (folder / "transformer" / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"transformer/{name} is pickled"):
        open_checkpoint(str(folder)).hash()


def test_a_variant_alone_is_not_taken_for_the_weights(folder: Path) -> None:
    for file in (folder / "transformer").glob("*safetensors*"):
        file.unlink()
    save_file({"w": torch.zeros(1)}, folder / "transformer/model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.fp16\.safetensors"):
        open_checkpoint(str(folder)).weights("transformer")


@pytest.mark.parametrize("content", [b"{", b"[1]"])
def test_json_that_is_none_is_named(folder: Path, content: bytes) -> None:
    (folder / "transformer/config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"transformer/config\.json"):
        open_checkpoint(str(folder)).configs()


def test_a_truncated_shard_is_named(folder: Path) -> None:
    (folder / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors is damaged"):
        open_checkpoint(str(folder)).hash()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint("memory://nothing/at/all")
    with pytest.raises(CheckpointError, match="nosuchprotocol"):
        open_checkpoint("nosuchprotocol://bucket/checkpoint")


def test_a_revision_without_a_hub_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="revision 'v1'"):
        open_checkpoint(str(folder), revision="v1")


def test_a_local_folder_is_used_where_it_is(folder: Path, tmp_path: Path) -> None:
    assert fetch(open_checkpoint(str(folder)), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_fetched_folder_equals_its_source_and_is_fetched_once(
    in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(in_memory)
    place = fetch(source, tmp_path)
    assert open_checkpoint(str(place)).hash() == source.hash()
    monkeypatch.setattr("vidgen.checkpoint.fetch._download", lambda *a: pytest.fail(f"{a[1]} fetched again"))
    assert fetch(open_checkpoint(in_memory), tmp_path) == place


def test_a_fetch_that_was_killed_goes_on_where_it_was(in_memory: str, tmp_path: Path) -> None:
    source = open_checkpoint(in_memory)
    place = fetch(source, tmp_path)
    whole = place / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    kept = place / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    before = kept.stat().st_mtime_ns
    whole.rename(whole.with_name(f"{whole.name}.part"))
    whole.with_name(f"{whole.name}.part").write_bytes(b"half of it")
    assert fetch(source, tmp_path) == place
    assert open_checkpoint(str(place)).hash() == source.hash()
    assert kept.stat().st_mtime_ns == before


def test_a_copy_that_differs_from_its_source_is_refused(
    in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(in_memory)
    source.hash()
    original = source.fs.get_file

    def damaged(remote: str, local: str, **kwargs: Any) -> None:
        original(remote, local, **kwargs)
        if remote.endswith("00001-of-00002.safetensors"):
            for position in range(2000, 80_000, 8000):
                change(Path(local), position)

    monkeypatch.setattr(source.fs, "get_file", damaged)
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors differs from its source"):
        fetch(source, tmp_path)
    monkeypatch.setattr(source.fs, "get_file", lambda remote, local, **kwargs: Path(local).write_bytes(b"short"))
    with pytest.raises(CheckpointError, match="came with 5 bytes"):
        fetch(source, tmp_path)


def test_a_copy_that_went_bad_on_the_disk_is_not_used(in_memory: str, tmp_path: Path) -> None:
    source = open_checkpoint(in_memory)
    assert fetched(source, tmp_path).hash() == source.hash()
    assert fetched(source, tmp_path).resolved == source.resolved
    config = fetch(source, tmp_path) / "transformer/config.json"
    config.write_text(config.read_text().replace("3", "4"))
    with pytest.raises(CheckpointError, match="differs from its source; delete it"):
        fetched(source, tmp_path)


def test_too_small_a_disk_is_refused_before_anything_is_fetched(
    in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("vidgen.checkpoint.fetch.shutil.disk_usage", lambda place: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="10 free"):
        fetch(open_checkpoint(in_memory), tmp_path)


def with_hub(endpoint: str, lines: str, *arguments: str, count: int = 1) -> None:
    """Runs `lines` in processes that find `endpoint` in their environment when they import the hub's client."""
    command = [sys.executable, "-c", f"{IMPORTS}\n{lines}", *arguments]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    workers = [subprocess.Popen(command, env=environment) for _ in range(count)]
    assert [worker.wait(120) for worker in workers] == [0] * count


class Hub:
    """The few answers of the hub that a client needs for one model, over real HTTP."""

    def __init__(self, folder: Path) -> None:
        self.served: list[tuple[str, str | None]] = []
        hub = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                if path.startswith("/api/models/org/tiny/tree/"):
                    self.json([hub.entry(folder, file) for file in sorted(folder.rglob("*"))])
                elif path.startswith("/api/models/org/tiny"):
                    revision = path.rpartition("/")[2]
                    known = revision in ("main", "tiny", COMMIT)
                    self.json({"id": "org/tiny", "sha": COMMIT, "siblings": []} if known else {}, 200 if known else 404)
                elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
                    self.file(folder / path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"))
                else:
                    self.json({"error": "not found"}, 404)

            do_HEAD = do_GET
            do_POST = do_GET

            def json(self, value: Any, status: int = 200) -> None:
                self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

            def file(self, place: Path) -> None:
                content, span = place.read_bytes(), self.headers.get("Range")
                if self.command == "GET":
                    hub.served.append((str(place), span))
                headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if span is None:
                    return self.answer(content, 200, headers)
                start, end = (int(part) for part in span.removeprefix("bytes=").split("-"))
                part = content[start : end + 1]
                headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
                return self.answer(part, 206, headers)

            def answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def entry(folder: Path, place: Path) -> dict[str, Any]:
        kind = "directory" if place.is_dir() else "file"
        size = 0 if place.is_dir() else place.stat().st_size
        return {"type": kind, "oid": "0" * 40, "size": size, "path": place.relative_to(folder).as_posix()}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


RESOLVE = """
folder, commit = sys.argv[1:]
checkpoint = open_checkpoint("org/tiny")
assert (checkpoint.resolved.name, checkpoint.resolved.commit) == ("org/tiny", commit)
assert checkpoint.hash() == open_checkpoint(folder).hash()
try:
    open_checkpoint("org/tiny", revision="gone")
except CheckpointError as error:
    assert "revision 'gone'" in str(error)
else:
    raise AssertionError("a revision that is not there was resolved")
"""
FETCH = """
folder, cache = sys.argv[1:]
place = fetch(open_checkpoint("org/tiny"), cache)
assert open_checkpoint(str(place)).hash() == open_checkpoint(folder).hash()
"""
NO_HUB = """
try:
    open_checkpoint("org/tiny")
except CheckpointError as error:
    assert "'org/tiny' is neither a folder here nor" in str(error) and "on the hub" in str(error)
else:
    raise AssertionError("an id was resolved without a hub")
"""


def test_a_hub_id_is_resolved_to_its_commit_when_it_is_opened(folder: Path) -> None:
    with Hub(folder) as hub:
        with_hub(hub.url, RESOLVE, str(folder), COMMIT)


def test_processes_of_one_node_fetch_a_folder_once_between_them(folder: Path, tmp_path: Path) -> None:
    with Hub(folder) as hub:
        with_hub(hub.url, FETCH, str(folder), str(tmp_path / "cache"), count=2)
        whole = [path for path, span in hub.served if path.endswith("00001-of-00002.safetensors") and span is None]
        assert len(whole) == 1


def test_a_hub_id_without_network_is_a_clear_error() -> None:
    with_hub("http://127.0.0.1:9", NO_HUB)
