"""What the module names in other people's HunyuanVideo adapters mean: ways to write them -> ours. No torch.

    diffusers, PEFT   transformer.transformer_blocks.0.attn.to_q     base_model.model.transformer_blocks.0.attn.to_q
    the original      diffusion_model.double_blocks.0.img_attn_qkv   its queries, keys and values are one matrix
    ComfyUI           diffusion_model.double_blocks.0.img_attn.qkv
    kohya, musubi     lora_unet_double_blocks_0_img_attn_qkv         dots are underscores; any of the above

Refuses to know tensors, ranks and scales, and which modules a checkpoint has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
)
Names = tuple[str, ...]
"""Our modules that share the rows of an adapter's, in their order; mostly one."""


def _stream(stream: str, suffix: str, ours: Mapping[str, Names]) -> dict[str, Names]:
    """A stream of a dual block: img or txt; `suffix` is what ours has after a name of the text's."""
    projections = {"qkv": ours["qkv"], "proj": ours["proj"]}
    found = {f"{stream}_attn{sign}{name}": parts for name, parts in projections.items() for sign in "_."}
    found |= {f"{stream}_mod.{name}": (f"norm1{suffix}.linear",) for name in ("linear", "lin")}
    for name, part in (("fc1", "net.0.proj"), ("0", "net.0.proj"), ("fc2", "net.2"), ("2", "net.2")):
        found[f"{stream}_mlp.{name}"] = (f"ff{suffix}.{part}",)
    return found


VIDEO: dict[str, Names] = {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("attn.to_out.0",)}
TEXT: dict[str, Names] = {
    "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj": ("attn.to_add_out",),
}
DUAL: dict[str, Names] = {**_stream("img", "", VIDEO), **_stream("txt", "_context", TEXT)}
SINGLE: dict[str, Names] = {
    "linear1": (*VIDEO["qkv"], "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.linear": ("norm.linear",),
    "modulation.lin": ("norm.linear",),
}
REFINER: dict[str, Names] = {
    **{f"self_attn{sign}qkv": VIDEO["qkv"] for sign in "_."},
    **{f"self_attn{sign}proj": VIDEO["proj"] for sign in "_."},
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
_TIMES = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
OUTSIDE: dict[str, Names] = {
    "img_in.proj": ("x_embedder.proj",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    **{f"{a}.mlp.{n}": (f"time_text_embed.{b}.linear_{1 + n // 2}",) for a, b in _TIMES.items() for n in (0, 2)},
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    **{
        f"txt_in.t_embedder.mlp.{n}": (f"context_embedder.time_text_embed.timestep_embedder.linear_{1 + n // 2}",)
        for n in (0, 2)
    },
    **{
        f"txt_in.c_embedder.linear_{n}": (f"context_embedder.time_text_embed.text_embedder.linear_{n}",) for n in (1, 2)
    },
    "final_layer.linear": ("proj_out",),
}
"""What is in no block. The last layer's modulation is not here: the original has its halves in the other order."""


def _both_ways(originals: Mapping[str, Names]) -> dict[str, Names]:
    """Every way to write a part: the original's name and ours, each with dots and with underscores."""
    named = {**originals, **{name: (name,) for names in originals.values() for name in names}}
    return {**{name.replace(".", "_"): ours for name, ours in named.items()}, **named}


BLOCKS = (
    (r"(?:double_blocks|transformer_blocks)", "transformer_blocks", _both_ways(DUAL)),
    (r"(?:single_blocks|single_transformer_blocks)", "single_transformer_blocks", _both_ways(SINGLE)),
    (
        r"(?:txt_in[._]individual_token_refiner[._]blocks|context_embedder[._]token_refiner[._]refiner_blocks)",
        "context_embedder.token_refiner.refiner_blocks",
        _both_ways(REFINER),
    ),
)
"""What lists of blocks are called, ours, and their parts."""
_OUTSIDE = _both_ways(OUTSIDE)


def module_name(original: str) -> str | tuple[str, ...] | None:
    """The name in our transformer of what an adapter calls `original`, the path before `.lora_A`, `.lora_down`,
    `.alpha`, `.diff` and the like, with or without its prefix; several, where rows of one of the original's matrices
    are modules of their own here. None for what is not HunyuanVideo's."""
    path = original
    for prefix in PREFIXES:
        path = path.removeprefix(prefix)
    names = _OUTSIDE.get(path)
    for pattern, ours, parts in BLOCKS:
        if found := re.fullmatch(rf"{pattern}[._](\d+)[._](.+)", path):
            names = tuple(f"{ours}.{found[1]}.{name}" for name in parts.get(found[2], ()))
    if not names:
        return None
    return names[0] if len(names) == 1 else names
