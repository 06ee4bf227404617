"""What the module names in other people's Wan adapters mean: three ways to write them -> ours. Standard library only.

    diffusers, PEFT   transformer.blocks.0.attn1.to_q         base_model.model.blocks.0.attn1.to_q
    the original      diffusion_model.blocks.0.self_attn.q
    kohya             lora_unet_blocks_0_self_attn_q          dots are underscores; either of the two above

Refuses to know tensors, ranks and scales, and which modules a checkpoint has.
"""

from __future__ import annotations

import re

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer_2.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
)
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
IMAGE_PROJECTIONS = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
IN_BLOCK = {
    **{f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in ATTENTIONS.items() for a, b in PROJECTIONS.items()},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in IMAGE_PROJECTIONS.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    # The original counts its norms otherwise: self-attention 1, feed-forward 2, cross-attention 3.
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
"""The original's name of a part of a block -> ours."""
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
"""The original's name of what is not in a block -> ours."""
BLOCK = re.compile(r"blocks[._](\d+)[._](.+)")


def _both_ways(originals: dict[str, str]) -> dict[str, str]:
    """Every way to write a part: the original's name and ours, each with dots and with underscores."""
    named = {**originals, **{name: name for name in originals.values()}}
    return {**{name.replace(".", "_"): ours for name, ours in named.items()}, **named}


_IN_BLOCK = _both_ways(IN_BLOCK)
_OUTSIDE = _both_ways(OUTSIDE)


def module_name(original: str) -> str | None:
    """The name in our transformer of what an adapter calls `original`, the path before `.lora_A`, `.lora_down`,
    `.alpha`, `.diff` and the like, with or without its prefix. A `modulation` is our parameter of another name, and
    so is `img_emb.emb_pos`. None for what is not Wan's."""
    path = original
    for prefix in PREFIXES:
        path = path.removeprefix(prefix)
    found = BLOCK.fullmatch(path)
    if found is None:
        return _OUTSIDE.get(path)
    ours = _IN_BLOCK.get(found[2])
    return None if ours is None else f"blocks.{found[1]}.{ours}"
