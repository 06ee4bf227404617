"""LoRA adapters: fused as their published forms mean it, wholly or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.wan import tiny_checkpoint
from vidgen import engine
from vidgen.checkpoint.adapter import Adapter, open_adapter
from vidgen.checkpoint.folder import open_checkpoint
from vidgen.errors import CheckpointError
from vidgen.types import Lora

ROUNDING = 1e-6
"""The product of the low-rank factors, once in fp32 here and once inside the reference."""
Q, FFN = "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"
WIDTH, INNER = 24, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def factors() -> dict[str, Tensor]:
    """Low-rank factors of two modules: down [rank, in], up [out, rank]."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"q.down": (3, WIDTH), "q.up": (WIDTH, 3), "ffn.down": (3, INNER), "ffn.up": (WIDTH, 3)}
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


def weights(folder: Path, *loras: Lora) -> dict[str, Tensor]:
    loaded = engine.load(str(folder), loras=loras)
    return loaded.backend.pipeline.transformer.state_dict()  # type: ignore[attr-defined]


def write(place: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    save_file({key: value.contiguous() for key, value in tensors.items()}, place, metadata)
    return str(place)


def peft_form(factors: dict[str, Tensor], prefix: str = "transformer.") -> dict[str, Tensor]:
    return {
        f"{prefix}{Q}.lora_A.weight": factors["q.down"],
        f"{prefix}{Q}.lora_B.weight": factors["q.up"],
        f"{prefix}{FFN}.lora_A.weight": factors["ffn.down"],
        f"{prefix}{FFN}.lora_B.weight": factors["ffn.up"],
    }


def expect(folder: Path, found: dict[str, Tensor], factors: dict[str, Tensor], scale: float) -> None:
    plain = weights(folder)
    changed = {f"{Q}.weight": ("q.up", "q.down"), f"{FFN}.weight": ("ffn.up", "ffn.down")}
    for key, before in plain.items():
        if key in changed:
            up, down = (factors[name] for name in changed[key])
            before = before + scale * (up @ down)
        torch.testing.assert_close(found[key], before, rtol=0, atol=20 * ROUNDING)


def test_an_adapter_in_pefts_keys_is_added_with_its_weight(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", peft_form(factors))
    expect(checkpoint, weights(checkpoint, Lora(path, 0.5)), factors, 0.5)


def test_diffusers_and_peft_give_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    """The reference trains, saves and fuses an adapter of its own; ours reads its file."""
    pipe = WanPipeline.from_pretrained(checkpoint)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_k", "ffn.net.2"])
    pipe.transformer.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    fresh = WanPipeline.from_pretrained(checkpoint)
    fresh.load_lora_weights(tmp_path, adapter_name="own")
    fresh.fuse_lora(adapter_names=["own"], lora_scale=0.7)
    fresh.unload_lora_weights()
    theirs = fresh.transformer.state_dict()
    ours = weights(checkpoint, Lora(str(tmp_path), 0.7))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=20 * ROUNDING)
    assert (ours[f"{Q}.weight"] - weights(checkpoint)[f"{Q}.weight"]).abs().max() > 0.01


def test_kohyas_underscores_and_alpha_are_understood(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path
) -> None:
    keys = {Q: "q", FFN: "ffn"}
    tensors = {}
    for module, name in keys.items():
        flat = "lora_unet_" + module.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = factors[f"{name}.down"]
        tensors[f"{flat}.lora_up.weight"] = factors[f"{name}.up"]
        tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    path = write(tmp_path / "kohya.safetensors", tensors)
    expect(checkpoint, weights(checkpoint, Lora(path)), factors, 0.5)


def test_full_differences_of_weights_and_biases_are_added(checkpoint: Path, tmp_path: Path) -> None:
    diff, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    path = write(tmp_path / "d.safetensors", {f"diffusion_model.{Q}.diff": diff, f"diffusion_model.{Q}.diff_b": bias})
    plain, found = weights(checkpoint), weights(checkpoint, Lora(path, 2.0))
    torch.testing.assert_close(found[f"{Q}.weight"], plain[f"{Q}.weight"] + 2 * diff)
    torch.testing.assert_close(found[f"{Q}.bias"], plain[f"{Q}.bias"] + 2 * bias)


def test_several_adapters_add_up_and_their_order_does_not_matter(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path
) -> None:
    one = Lora(write(tmp_path / "a.safetensors", peft_form(factors)), 0.5)
    two = Lora(write(tmp_path / "b.safetensors", peft_form(factors, "diffusion_model.")), 0.25)
    expect(checkpoint, weights(checkpoint, one, two), factors, 0.75)
    expect(checkpoint, weights(checkpoint, two, one), factors, 0.75)


def test_an_adapter_of_the_text_encoder_changes_it(checkpoint: Path, tmp_path: Path) -> None:
    key = "encoder.block.0.layer.0.SelfAttention.q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"text_encoder.{key}.lora_A.weight": down, f"text_encoder.{key}.lora_B.weight": up}
    path = write(tmp_path / "t.safetensors", tensors)
    before = load_file(checkpoint / "text_encoder/model.safetensors")[f"{key}.weight"]
    encoder = engine.load(str(checkpoint), loras=(Lora(path),)).backend.pipeline.text_encoder  # type: ignore[attr-defined]
    torch.testing.assert_close(encoder.model.state_dict()[f"{key}.weight"], before + up @ down)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"transformer.blocks.0.attn9.to_q.lora_A.weight": (3, WIDTH)}, "blocks.0.attn9.to_q"),
        ({"transformer.blocks.7.attn1.to_q.diff": (WIDTH, WIDTH)}, "match no tensor of the checkpoint"),
        ({f"transformer.{Q}.lora_magnitude_vector": (WIDTH,)}, "of no known kind"),
        ({f"transformer.{Q}.hada_w1_a": (3, 3)}, "of no known kind"),
        ({f"transformer.{Q}.diff": (3, 3)}, r"is \[3, 3\]"),
        ({"unet.down_blocks.0.to_q.diff": (3, 3)}, "match no tensor"),
    ],
)
def test_keys_that_fit_nothing_are_named(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path, change: dict[str, tuple[int, ...]], named: str
) -> None:
    tensors = peft_form(factors) | {key: torch.ones(shape) for key, shape in change.items()}
    for key in change:
        if "lora_A" in key:
            tensors[key.replace("lora_A", "lora_B")] = torch.ones(WIDTH, 3)
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=named) as caught:
        engine.load(str(checkpoint), loras=(Lora(path),))
    assert "bad.safetensors" in str(caught.value)


def test_factors_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {
        f"transformer.{Q}.lora_A.weight": torch.ones(3, 5),
        f"transformer.{Q}.lora_B.weight": torch.ones(WIDTH, 3),
    }
    path = write(tmp_path / "thin.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"\[24, 3\] x .*\[3, 5\] does not fit"):
        engine.load(str(checkpoint), loras=(Lora(path),))


def test_half_an_adapter_is_refused(checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "half.safetensors", {f"transformer.{Q}.lora_A.weight": factors["q.down"]})
    with pytest.raises(CheckpointError, match="is incomplete"):
        engine.load(str(checkpoint), loras=(Lora(path),))


def test_a_missing_or_damaged_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_bytes(b"not a safetensors file")
    (tmp_path / "two").mkdir()
    write(tmp_path / "two/a.safetensors", {"a": torch.ones(1)})
    write(tmp_path / "two/b.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_adapter(str(tmp_path / "text.safetensors"))
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors"):
        open_adapter(str(tmp_path / "two"))
    with pytest.raises(CheckpointError, match="absent"):
        open_adapter(str(tmp_path / "absent"))


def test_rank_and_alpha_come_from_adapter_config_too(
    factors: dict[str, Tensor], checkpoint: Path, tmp_path: Path
) -> None:
    tensors = {key.replace("transformer.", "base_model.model."): v for key, v in peft_form(factors).items()}
    write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    expect(checkpoint, weights(checkpoint, Lora(str(tmp_path))), factors, 2.0)


def test_the_digest_follows_the_content_not_the_name(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = open_checkpoint(str(checkpoint))

    def digests(*adapters: Adapter) -> tuple[tuple[str, float, str], ...]:
        return folder.with_adapters(adapters, None).adapter_digests()

    first = open_adapter(write(tmp_path / "a.safetensors", peft_form(factors)))
    twin = open_adapter(write(tmp_path / "b.safetensors", peft_form(factors)))
    other = open_adapter(
        write(tmp_path / "c.safetensors", {key: value + 1e-3 for key, value in peft_form(factors).items()})
    )
    assert digests(first) == digests(twin) != digests(other)


def test_an_adapter_for_one_expert_names_its_component(
    checkpoint: Path, factors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", peft_form(factors, "diffusion_model."))
    with pytest.raises(CheckpointError, match="match no tensor"):
        engine.load(str(checkpoint), loras=(Lora(path, 1.0, "transformer_2"),))
