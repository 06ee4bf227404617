"""Weights are assigned strictly: what does not fit is named, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidgen.checkpoint.folder import CheckpointFolder, open_checkpoint
from vidgen.checkpoint.load import load_weights, published_dtype
from vidgen.errors import CheckpointError

Change = Callable[[dict[str, Tensor]], None]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.embed = nn.Embedding(5, 3)
        self.shared = nn.Embedding(5, 3)
        self.register_buffer("count", torch.tensor([3]))


TIED = {"embed.weight": "shared.weight"}


def tensors() -> dict[str, Tensor]:
    state = {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in Network().state_dict().items()}
    del state["embed.weight"]
    return state


def checkpoint(place: Path, state: dict[str, Tensor], sharded: bool = False) -> CheckpointFolder:
    (place / "net").mkdir(parents=True)
    (place / "model_index.json").write_text(json.dumps({"net": ["library", "Network"]}))
    (place / "net/config.json").write_text("{}")
    if not sharded:
        save_file(state, place / "net/model.safetensors")
        return open_checkpoint(str(place))
    keys = sorted(state)
    shards = {"model-1.safetensors": keys[:3], "model-2.safetensors": keys[3:]}
    for shard, held in shards.items():
        save_file({key: state[key] for key in held}, place / "net" / shard)
    index = {"weight_map": {key: shard for shard, held in shards.items() for key in held}}
    (place / "net/model.safetensors.index.json").write_text(json.dumps(index))
    return open_checkpoint(str(place))


def load(folder: CheckpointFolder, dtype: torch.dtype = torch.float32, keep_fp32: tuple[str, ...] = ()) -> Network:
    with torch.device("meta"):
        network = Network()
    return load_weights(network, folder, "net", dtype=dtype, keep_fp32=keep_fp32, tied=TIED)


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_arrives_and_tied_ones_are_one(tmp_path: Path, sharded: bool) -> None:
    state = tensors()
    network = load(checkpoint(tmp_path, state, sharded))
    for key, value in state.items():
        assert torch.equal(network.state_dict()[key], value)
    assert network.embed.weight is network.shared.weight
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_tied_tensor_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    state = tensors()
    alias = {("embed.weight" if key == "shared.weight" else key): value for key, value in state.items()}
    both = state | {"embed.weight": state["shared.weight"].clone()}
    for number, stored in enumerate((alias, both)):
        network = load(checkpoint(tmp_path / str(number), stored))
        assert torch.equal(network.embed.weight, state["shared.weight"])
    with pytest.raises(CheckpointError, match=r"embed\.weight and shared\.weight, which must be equal"):
        load(checkpoint(tmp_path / "unequal", both | {"embed.weight": state["shared.weight"] + 1}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("inner.bias"), r"1 missing: inner\.bias"),
        (lambda state: state.update({"inner.extra": torch.zeros(1)}), r"1 extra: inner\.extra"),
        (lambda state: state.update({"norm.weight": torch.zeros(7)}), r"1 mis-shaped: norm\.weight is \[7\].*\[4\]"),
        (lambda state: state.pop("shared.weight"), r"2 missing: embed\.weight, shared\.weight"),
    ],
)
def test_a_key_that_does_not_fit_is_named(tmp_path: Path, sharded: bool, change: Change, named: str) -> None:
    state = tensors()
    change(state)
    with pytest.raises(CheckpointError, match=named):
        load(checkpoint(tmp_path, state, sharded))


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors(), sharded=True)
    place = tmp_path / "net/model.safetensors.index.json"
    entries = json.loads(place.read_text())["weight_map"]
    place.write_text(json.dumps({"weight_map": {**entries, "inner.bias": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"inner\.bias into model-2\.safetensors, which lacks it"):
        load(folder)
    del entries["inner.bias"]
    place.write_text(json.dumps({"weight_map": entries}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors holds inner\.bias, which the index lacks"):
        load(open_checkpoint(str(tmp_path)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tensors())
    place = tmp_path / "net/model.safetensors"
    place.write_bytes(place.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"net/model\.safetensors cannot be read"):
        load(folder)


def test_a_component_without_weights_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, tensors())
    (tmp_path / "net/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="net has no safetensors file"):
        load(open_checkpoint(str(tmp_path)))


def test_dtype_holds_for_floating_point_weights_that_are_not_kept_in_fp32(tmp_path: Path) -> None:
    network = load(checkpoint(tmp_path, tensors()), torch.bfloat16, keep_fp32=("norm",))
    assert network.inner.weight.dtype == torch.bfloat16
    assert network.norm.weight.dtype == torch.float32
    assert network.get_buffer("count").dtype == torch.int64


def test_the_published_dtype_is_the_stored_one_unless_a_config_names_another(tmp_path: Path) -> None:
    state = {key: v.bfloat16() if v.is_floating_point() else v for key, v in tensors().items()}
    state["norm.weight"] = state["norm.weight"].float()
    folder = checkpoint(tmp_path, state)
    assert published_dtype(folder, "net") == torch.bfloat16
    (tmp_path / "net/config.json").write_text('{"dtype": "float32"}')
    assert published_dtype(open_checkpoint(str(tmp_path)), "net") == torch.float32
    (tmp_path / "vidgen.json").write_text('{"dtype": "bfloat16"}')
    assert published_dtype(open_checkpoint(str(tmp_path)), "net") == torch.bfloat16
    (tmp_path / "vidgen.json").write_text('{"dtype": "int4"}')
    with pytest.raises(CheckpointError, match="'int4'"):
        published_dtype(open_checkpoint(str(tmp_path)), "net")


def test_weights_of_a_quantized_dtype_are_refused(tmp_path: Path) -> None:
    state = {"inner.weight": torch.zeros(4, 3).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        published_dtype(checkpoint(tmp_path, state), "net")


def test_the_files_are_not_changed_by_a_module_that_maps_them(tmp_path: Path) -> None:
    state = tensors()
    network = load(checkpoint(tmp_path, state))
    with torch.no_grad():
        network.inner.bias.add_(1)
    assert torch.equal(load_file(tmp_path / "net/model.safetensors")["inner.bias"], state["inner.bias"])
