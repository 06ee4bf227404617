"""LoRA adapters fused into the networks of a pipeline, whatever they are called there.

`vidgen.checkpoint.adapter` knows the keys of PEFT, diffusers and kohya; this file puts into those words what UNets and
motion modules were published with (`unet.`, `.processor.to_q_lora.down`, `lora_te_`). Refuses to know where files lie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vidgen.checkpoint.adapter import Adapter, Delta, assign
from vidgen.checkpoint.load import fused

NETWORKS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "controlnet")
_ATTENTION = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def fuse(pipe: Any, adapters: Sequence[Adapter]) -> None:
    """Adds every adapter to the weights it names, in fp32. CheckpointError names keys that fit nothing."""
    networks = {name: network for name in NETWORKS if isinstance(network := getattr(pipe, name, None), nn.Module)}
    states = {name: network.state_dict() for name, network in networks.items()}
    shapes = {name: {key: tuple(t.shape) for key, t in state.items()} for name, state in states.items()}
    denoiser = "unet" if "unet" in networks else "transformer"
    for adapter in adapters:
        names = {_plain(key, shapes): key for key in adapter.shapes}
        component = adapter.component or denoiser
        plain = replace(adapter, shapes={new: adapter.shapes[old] for new, old in names.items()}, component=component)
        for network, tensors in assign([plain], shapes, None).items():
            for key, deltas in tensors.items():
                weight = states[network][key]
                with torch.no_grad():
                    weight.copy_(fused(weight, [_stored(d, names) for d in deltas], [adapter]).to(weight.dtype))


def _stored(delta: Delta, names: dict[str, str]) -> Delta:
    """The same, with the tensors named as the file names them."""
    down, up, full, alpha = (names.get(name, "") for name in (delta.down, delta.up, delta.full, delta.alpha))
    return replace(delta, down=down, up=up, full=full, alpha=alpha)


def _plain(key: str, shapes: dict[str, Any]) -> str:
    """A published key in the words of PEFT."""
    key = key.removeprefix("unet.").replace(".processor.", ".")
    found = _ATTENTION.search(key)
    if found is not None:
        module = "to_out.0" if found.group(1) == "out" else f"to_{found.group(1)}"
        return f"{key[: found.start()]}.{module}.lora_{'A' if found.group(2) == 'down' else 'B'}.weight"
    for prefix, component in (
        ("lora_te2_", "text_encoder_2"),
        ("lora_te1_", "text_encoder"),
        ("lora_te_", "text_encoder"),
    ):
        if key.startswith(prefix):
            module, dot, kind = key.removeprefix(prefix).partition(".")
            return f"{component}.{_text_module(module, shapes.get(component, {}))}{dot}{kind}"
    if key.startswith(("text_encoder.text_model.", "text_encoder_2.text_model.")):
        component, _, rest = key.partition(".")
        known = any(name.startswith("text_model.") for name in shapes.get(component, {}))
        return key if known else f"{component}.{rest.removeprefix('text_model.')}"
    return key


def _text_module(joined: str, known: dict[str, Any]) -> str:
    """A module of the text encoder by its path with underscores, with or without the `text_model` of older releases."""
    by_name = {key.rpartition(".")[0].replace(".", "_"): key.rpartition(".")[0] for key in known}
    return by_name.get(joined) or by_name.get(joined.removeprefix("text_model_")) or joined
