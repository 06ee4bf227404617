"""Checkpoints and adapters of a stranger's making: safetensors alone, and no code of theirs is ever run."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from vidgen.checkpoint import adapter, load
from vidgen.checkpoint.folder import CheckpointFolder, open_checkpoint
from vidgen.errors import CheckpointError
from vidgen.text.configs import load_config, no_questions
from vidgen.text.tokenizers import load_tokenizer

HEADER_LIMIT = 100_000_000


class Evil:
    """What unpickling it would do: write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """There only if somebody's code was run."""
    return tmp_path / "owned"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint of one component with weights, and a tokenizer."""
    written: dict[str, Any] = {
        "model_index.json": {"transformer": ["diffusers", "X"], "tokenizer": ["transformers", "T5TokenizerFast"]},
        "transformer/config.json": {"_class_name": "X"},
        "tokenizer/tokenizer_config.json": {},
    }
    for name, value in written.items():
        (tmp_path / "ckpt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ckpt" / name).write_text(json.dumps(value))
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "ckpt/transformer/model.safetensors")
    return tmp_path / "ckpt"


def opened(place: Path) -> CheckpointFolder:
    return open_checkpoint(str(place))


def safetensors(header: Any, tail: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tail


def refused(place: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        folder = opened(place)
        folder.configs()
        folder.hash()
        load.load_weights(nn.Linear(2, 2, bias=False, device="meta"), folder, "transformer", dtype=torch.float32)
    return str(caught.value)


def test_the_checkpoint_of_these_tests_is_loaded(place: Path) -> None:
    module = nn.Linear(2, 2, bias=False, device="meta")
    assert load.load_weights(module, opened(place), "transformer", dtype=torch.float32).weight.sum() == 4


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["model.bin", "diffusion_pytorch_model.bin", "a.pt", "b.pth", "c.ckpt", "d.pkl"])
def test_pickled_weights_alone_are_refused_and_never_opened(name: str, place: Path, mark: Path) -> None:
    (place / "transformer/model.safetensors").unlink()
    (place / "transformer" / name).write_bytes(pickle.dumps(Evil(mark)))
    told = refused(place)
    assert f"transformer/{name} is pickled, and opening it could run its author's code" in told and not mark.exists()


def test_a_pickle_beside_or_under_the_name_of_safetensors_is_never_opened(place: Path, mark: Path) -> None:
    evil = pickle.dumps(Evil(mark))
    (place / "transformer/model.bin").write_bytes(evil)
    opened(place).hash()
    (place / "transformer/model.safetensors").write_bytes(evil)
    assert "transformer/model.safetensors is damaged: its header is longer than the file" in refused(place)
    archive = io.BytesIO()
    torch.save({"weight": torch.ones(2, 2), "x": Evil(mark)}, archive)
    (place / "transformer/model.safetensors").write_bytes(archive.getvalue())
    assert "transformer/model.safetensors is damaged" in refused(place)
    assert not mark.exists()


@pytest.mark.parametrize(
    "shard", ["model.bin", "../../evil.bin", "..", "/etc/passwd", "a/b.safetensors", "", 3, None, ["x"]]
)
def test_an_index_names_safetensors_of_its_own_folder_alone(shard: Any, place: Path, mark: Path) -> None:
    (place / "transformer/model.bin").write_bytes(pickle.dumps(Evil(mark)))
    index = {"weight_map": {"weight": shard}}
    (place / "transformer/model.safetensors.index.json").write_text(json.dumps(index))
    told = refused(place)
    assert "transformer/model.safetensors.index.json puts weight into " in told and not mark.exists()
    assert told.endswith(("not a file name", "allowed: safetensors files alone"))


def test_an_adapter_that_is_pickled_is_refused_and_never_opened(tmp_path: Path, mark: Path) -> None:
    for name in ("lora.bin", "lora.pt", "lora.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(CheckpointError, match=rf"model.loras: .*{name} is not a safetensors file") as caught:
            adapter.open_adapter(str(tmp_path / name))
        assert ("pickled weights are not opened" in str(caught.value)) == (not name.endswith(".safetensors"))
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match="must name one safetensors file; the folder has none"):
        adapter.open_adapter(str(folder))
    assert not mark.exists()


# ---------------------------------------------------------------- code


def test_code_that_a_tokenizer_or_a_config_brings_is_not_run(
    place: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_map` and a class of the folder's own: transformers asks, unless it is told, whether to trust them."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # `yes | vidgen generate`
    code = f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n"
    for folder in ("tokenizer", "transformer"):
        (place / folder / "evil.py").write_text(code)
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (place / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    (place / "tokenizer/vocab.json").write_text("{}")
    (place / "tokenizer/config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    folder = opened(place)
    folder.configs(), folder.hash()
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder, "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_config(folder, "tokenizer", ["evil"])
    for auto in (AutoTokenizer, AutoConfig):  # as diffusers calls them, which cannot be told
        with no_questions(), pytest.raises(ValueError, match="requires you to execute"):
            auto.from_pretrained(place / "tokenizer", local_files_only=True)
    assert not mark.exists()


def test_no_code_of_ours_trusts_remote_code_or_unpickles_weights() -> None:
    """Read in the source: what opens files of others says safetensors; the demo alone reads pickles, its own."""
    sources = {path: path.read_text() for path in Path(load.__file__).parents[1].rglob("*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        assert "trust_remote_code=True" not in text and "exec(" not in text.replace("_exec(", ""), path
        assert not any(word in text for word in (" eval(", "(eval(", "os.system(", "shell=True")), path
        if "torch.load(" in text.replace("safetensors.torch.load(", ""):
            assert path.parent.name == "demo", path
        for call in text.split(".from_pretrained(")[1:]:
            if "models/diffusers" in path.as_posix() or path.parent.name == "parity":
                assert "use_safetensors=True" in call.split("\n\n")[0] and "with no_questions():" in text, path
        for auto in ("AutoTokenizer.", "AutoConfig."):
            for call in text.split(f"{auto}from_pretrained(")[1:]:
                assert "trust_remote_code=False" in call.partition("\n")[0], path


# ---------------------------------------------------------------- odd headers


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has 0 bytes"),
        (b"\xff" * 8, "its header is longer than the file"),
        (safetensors(b"[" * 100_000), "is damaged: its header is not that of tensors"),
        (safetensors(b"\xff\xfe{}"), "is damaged"),
        (safetensors([1, 2]), "its header is not that of tensors"),
        (safetensors({"weight": 3}), "its header is not that of tensors"),
        (safetensors({"weight": {"dtype": "F32", "shape": [-1]}}), "its header gives weight the shape [-1]"),
        (safetensors({"weight": {"dtype": "F32", "shape": ["x"]}}), "its header gives weight the shape ['x']"),
        (safetensors({"weight": {"dtype": [], "shape": [2]}}), "its header gives weight the shape [2]"),
        (safetensors({"__metadata__": {"a": 1}}), "its metadata is not text"),
        (
            safetensors({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 10**15]}}, b"\0" * 16),
            "cannot be read",
        ),
        (
            safetensors({"weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, b"\0" * 16),
            "cannot be read",
        ),
    ],
)
def test_a_header_that_lies_is_a_damaged_file_by_name(data: bytes, words: str, place: Path) -> None:
    (place / "transformer/model.safetensors").write_bytes(data)
    folder = str(place)
    told = refused(place)
    assert folder in told and "transformer/model.safetensors" in told and words in told


def test_a_header_of_gigabytes_is_not_read(place: Path) -> None:
    with (place / "transformer/model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30))
        file.truncate((2 << 30) + 8)  # takes no room on the disk
    assert f"its header would have 2,147,483,648 bytes; allowed: at most {HEADER_LIMIT:,}" in refused(place)
    with pytest.raises(CheckpointError, match="its header would have 2,147,483,648 bytes"):
        adapter.open_adapter(str(place / "transformer/model.safetensors"))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"nul", b"\xff", b'{"a": ' + b"9" * 5_000 + b"}", b""])
@pytest.mark.parametrize(
    "path", ["model_index.json", "transformer/config.json", "transformer/model.safetensors.index.json"]
)
def test_json_of_any_kind_is_read_or_named(content: bytes, path: str, place: Path) -> None:
    (place / path).write_bytes(content)
    assert path in refused(place)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "", "a/../b", "model_index", "\0", "..", "transformer/.."])
def test_a_component_is_a_folder_below_the_checkpoint(name: str, place: Path) -> None:
    (place / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"]}))
    told = refused(place)
    assert f"component {name} is listed in model_index.json, but the folder {name}/ is missing" in told


def test_a_name_longer_than_any_disk_has_is_a_checkpoint_that_is_not_there() -> None:
    for name in ("x" * 5_000, "a/" + "x" * 5_000, "a\0b"):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)


# ---------------------------------------------------------------- adapters

KNOWN = {"transformer": {"q.weight": (4, 4), "q.bias": (4,), "scale": ()}}


def lora(tmp_path: Path, shapes: dict[str, tuple[int, ...]], **metadata: Any) -> adapter.Adapter:
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    place = tmp_path / "lora.safetensors"
    save_file(tensors, place, {name: json.dumps(value) for name, value in metadata.items()} or None)
    return adapter.open_adapter(str(place))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"q.lora_A.weight": (4,), "q.lora_B.weight": (4, 1)}, "q.lora_A.weight is no matrix"),
        ({"q.lora_A.weight": (), "q.lora_B.weight": ()}, "q.lora_A.weight is no matrix"),
        ({"scale.diff": (1,)}, "scale is no matrix"),
        ({"q.diff": ()}, "q.diff is no matrix|is \\[\\]"),
        ({"q.lora_A.weight": (0, 4), "q.lora_B.weight": (4, 0)}, "of rank 0"),
        (
            {"q.lora_down.weight": (1, 4), "q.lora_up.weight": (4, 1), "q.alpha": (2,)},
            r"q.alpha is \[2\], not one number",
        ),
    ],
)
def test_shapes_that_no_adapter_has_are_named(shapes: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    flat = {"transformer.lora_alpha": 1}
    with pytest.raises(CheckpointError, match=f"model.loras: .*({words})"):
        adapter.assign([lora(tmp_path, shapes, lora_adapter_metadata=flat)], KNOWN, None)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"transformer.lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"transformer.lora_alpha": True}, "lora_alpha is True"),
        ({"transformer.alpha_pattern": [1]}, r"alpha_pattern is \[1\], not an object"),
        ({"transformer.alpha_pattern": {"(": 1}}, r"alpha_pattern '\('"),
        ({"transformer.alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern '\(a\+\)\+\$' repeats more than once"),
        ({"transformer.alpha_pattern": {"q": None, "q|x": []}}, r"lora_alpha is \[\]"),
        ([], "its lora_alpha cannot be read"),
        (3, "its lora_alpha cannot be read"),
    ],
)
def test_alphas_and_patterns_that_are_none_are_named_and_none_runs_for_ever(
    meta: Any, words: str, tmp_path: Path
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q.lora_A.weight": (1, 4), "q.lora_B.weight": (4, 1)}
    with pytest.raises(CheckpointError, match=f"model.loras: .*{words}"):
        adapter.assign([lora(tmp_path, shapes, lora_adapter_metadata=meta)], KNOWN, None)


def test_a_pattern_of_one_repetition_is_still_understood(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)}
    opened = lora(tmp_path, shapes, lora_adapter_metadata={"transformer.alpha_pattern": {r"(.*\.)?q": 6}})
    (delta,) = adapter.assign([opened], KNOWN, None)["transformer"]["q.weight"]
    assert delta.scale == pytest.approx(3.0) and np.isfinite(delta.scale)
