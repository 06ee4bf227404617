"""Makes tiny random HunyuanVideo checkpoints in the Diffusers layout, one a kind that was published.

They are written by diffusers and transformers themselves, so a checkpoint that opens here is one that they would make.
The offline tokenizer cuts the templates of the prompts into as many tokens as Llama 3's does.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.models.case import Case
from tests.models.offline import SPECIAL, WORDS, randomise, tokenizer
from vidgen.text.llama_clip import PICTURE_TEMPLATE, TEMPLATE

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "concat": {"in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    "replace": {"image_condition_type": "token_replace"},
}
"""Changes to the transformer, as the published checkpoints have them."""
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.476986,
}
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>")
PIECES = r"atmos|phere|\n\n|\n|\w+|[^\w\s]"
"""What Llama 3 makes of the templates but for the words' own spaces: a word, a sign, or a break; one word in two."""
LLAMA: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "rms_norm_eps": 1e-5} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CLIP: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token a piece of the templates or a known word, `<unk>` for others, opened by `<|begin_of_text|>`."""
    pieces = re.findall(PIECES, TEMPLATE + PICTURE_TEMPLATE)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*LLAMA_SPECIAL, "<unk>", *WORDS, *pieces]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    opening = LLAMA_SPECIAL[0]
    made.post_processor = processors.TemplateProcessing(single=f"{opening} $A", special_tokens=[(opening, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=opening, eos_token="<|eot_id|>", pad_token="<pad>", unk_token="<unk>"
    )


def llama(seed: int = 1) -> LlamaModel:
    torch.manual_seed(seed)
    return randomise(LlamaModel(LlamaConfig(vocab_size=len(llama_tokenizer()), **LLAMA)), seed)


def llava(seed: int = 1) -> LlavaForConditionalGeneration:
    """With the picture size of the published one, for its tokens are counted in the prompt."""
    torch.manual_seed(seed)
    words = llama_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=2
    )
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(words), **LLAMA),
        vision_config=vision,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    return randomise(LlavaForConditionalGeneration(config), seed)


def clip(seed: int = 2) -> CLIPTextModel:
    torch.manual_seed(seed)
    size = len(WORDS) + len(SPECIAL)
    config = CLIPTextConfig(vocab_size=size, pad_token_id=0, bos_token_id=None, eos_token_id=1, **CLIP)
    return randomise(CLIPTextModel(config), seed)


def transformer(kind: str, seed: int = 3, **changes: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(seed)
    return randomise(HunyuanVideoTransformer3DModel(**TRANSFORMER | KINDS[kind] | changes), seed)


def vae(seed: int = 4, **changes: Any) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(seed)
    return randomise(AutoencoderKLHunyuanVideo(**VAE | changes), seed)


def build(folder: Path, kind: str = "t2v", *, shift: float = 7.0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint of one of KINDS into `folder`."""
    parts: dict[str, Any] = {
        "tokenizer": llama_tokenizer(),
        "tokenizer_2": tokenizer(length=77),
        "text_encoder": (llama() if kind == "t2v" else llava()).to(dtype),
        "text_encoder_2": clip().to(dtype),
        "transformer": transformer(kind).to(dtype),
        "vae": vae().to(dtype),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    if kind == "t2v":
        made = HunyuanVideoPipeline(**parts)
    else:
        size = {"height": 48, "width": 48}
        processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=size)
        made = HunyuanVideoImageToVideoPipeline(**parts, image_processor=processor)
    made.save_pretrained(folder)
    return folder


SIZE: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 21, "num_inference_steps": 3}


def _case(task: str, kind: str, **sampling: Any) -> Case:
    write = partial(build, kind=kind)
    return Case(task, lambda folder: write(folder) and None, SIZE | sampling, causal=False)


GUIDED = {"negative_prompt": "a dog and a square", "params": {"true_cfg_scale": 4.0}}

CASES: dict[str, Case] = {
    "t2v": _case("t2v", "t2v", guidance_scale=6.0),
    "t2v-true-cfg": _case("t2v", "t2v", **GUIDED),
    "i2v-token-replace": _case("i2v", "replace", guidance_scale=6.0),
    "i2v-token-replace-true-cfg": _case("i2v", "replace", **GUIDED),
    "i2v-latent-concat": _case("i2v", "concat"),
    "i2v-latent-concat-true-cfg": _case("i2v", "concat", **GUIDED),
}
