"""Writes a trained demo model as a checkpoint folder in the Diffusers layout, in bf16.

Refuses to know how the weights came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidgen.demo import data, tokenizer
from vidgen.models.wan.params import TransformerParams, VAEParams

SHIFT = 3.0
STEPS = 16
GUIDANCE = 3.0
MAX_TEXT_TOKENS = 512
"""What WanPipeline pads a prompt to unless it is told otherwise."""

COMPUTE = "float32"
"""What it runs in: exact everywhere, and where bf16 is emulated, faster. Plain diffusers does the same by default."""
CARD = """# The demo checkpoint

A Wan 2.1 text-to-video model small enough to ship: {parameters:.1f} million parameters, {megabytes:.1f} MB,
stored in bf16 and run in fp32: the same video in any program and on any CPU, with bf16 instructions or without.
It makes 64 x 64 pixel clips of 17 frames at 8 fps for prompts of one form:

    a {{colour}} {{shape}} moving {{direction}}

- colours: {colours}
- shapes: {shapes}
- directions: {directions}

Of the 96 combinations {held_out} were never seen in training; every word and every pair of words was. Other text is
tokenized (unknown words become `<unk>`) but means nothing to the model.

Any program that reads the Diffusers layout opens it: `WanPipeline.from_pretrained(folder)`. `vidgen.json` holds the
recommended sizes, steps and guidance. Trained from scratch on clips drawn by `vidgen/demo/data.py`, by

    python -m vidgen.demo.train --out DIR

and measured, by `python -m vidgen.demo.measure DIR`, on the frames of decoded mp4 files, one clip a prompt:

{table}
"""


def publish(
    folder: Path,
    vae: nn.Module,
    vae_params: VAEParams,
    transformer: nn.Module,
    transformer_params: TransformerParams,
    text_encoder: nn.Module,
    text_config: Mapping[str, Any],
) -> None:
    """Writes every component into `folder`: configs, bf16 weights, tokenizer, scheduler, model_index, vidgen.json."""
    tokenizer.save(folder / "tokenizer")
    vae_config = {
        "_class_name": "AutoencoderKLWan",
        **asdict(vae_params),
        "scale_factor_spatial": vae_params.spatial_factor,
        "scale_factor_temporal": vae_params.temporal_factor,
    }
    transformer_config = {
        "_class_name": "WanTransformer3DModel",
        **asdict(transformer_params),
        "qk_norm": "rms_norm_across_heads",
    }
    text = {**text_config, "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "dtype": COMPUTE}
    _component(folder / "vae", vae_config, vae.state_dict())
    _component(folder / "transformer", transformer_config, transformer.state_dict())
    weights = {k: v for k, v in text_encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    _component(folder / "text_encoder", text, weights, name="model")
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": SHIFT,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _json(folder / "model_index.json", index)
    own = {
        "defaults": {
            "height": data.SIZE,
            "width": data.SIZE,
            "num_frames": data.FRAMES,
            "fps": float(data.FPS),
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "negative_prompt": "",
            "shift": SHIFT,
            "sampler": "unipc",
        },
        "dtype": COMPUTE,
        "max_text_tokens": MAX_TEXT_TOKENS,
        "prompts": "a {red|green|blue|yellow|white|purple|orange|cyan} {circle|square|triangle} "
        "moving {left|right|up|down}",
    }
    _json(folder / "vidgen.json", own)


def describe(folder: Path, table: str) -> None:
    """Writes the model card, README.md, with the table of `measure`."""
    weights = sum(math.prod(t) for path in folder.rglob("*.safetensors") for t in _shapes(path))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    card = CARD.format(
        parameters=weights / 1e6,
        megabytes=size / 1e6,
        colours=", ".join(data.COLOURS),
        shapes=", ".join(data.SHAPES),
        directions=", ".join(data.DIRECTIONS),
        held_out=len(data.HELD_OUT),
        table="\n".join(f"    {line}" for line in table.splitlines()),
    )
    (folder / "README.md").write_text(card)


def _component(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], name: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", config)
    tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}
    path = folder / f"{name or 'diffusion_pytorch_model'}.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for its owner only; an installed package is read by others


def _shapes(path: Path) -> list[list[int]]:
    """Shapes of the tensors of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
