"""Writes a checkpoint of published size with random weights: `python -m tests.models.full_size "Wan 1.3B" FOLDER`.

Speed and memory do not depend on what the weights are, so `vidgen parity FOLDER --device cuda` then measures ours
beside diffusers where no published weights are at hand. Transformer and VAE are of the published size; what reads texts
is that of the tiny checkpoints, since it takes no part in a step, and the inputs of the transformer that it feeds are
as narrow.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.models.case import cases
from tests.models.published import find

TEXTS = ("text_", "caption_", "pooled_")
"""What the keys of a transformer's config.json begin with that say how wide texts are."""
NETWORKS = ("transformer", "transformer_2", "vae")


def write(name: str, folder: Path, *, dtype: torch.dtype, device: str = "cpu", layers: int | None = None) -> None:
    """Writes it into an empty folder. `layers`: of the transformer, where not all are wanted."""
    family, published = find(name)
    task = "i2v" if "I2V" in name else "t2v"
    tiny = next(case for known, case in cases().items() if known.startswith(f"{family}/") and case.task == task)
    tiny.write(folder)
    torch.manual_seed(0)
    for component in (one for one in NETWORKS if one in published):
        small = json.loads((folder / component / "config.json").read_text())
        config = {key: value for key, value in published[component].items() if not key.startswith("_")}
        config |= {key: value for key, value in small.items() if key.startswith(TEXTS)}
        if layers is not None and component != "vae":
            config |= {key: layers for key in config if key in ("num_layers", "num_single_layers")}
        shutil.rmtree(folder / component)
        _network(small["_class_name"], config, device).to(dtype).save_pretrained(folder / component)


def _network(cls: str, config: dict[str, Any], device: str) -> Any:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        return getattr(diffusers, cls).from_config(config).eval()
    finally:
        torch.set_default_device(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":", 1)[0])
    parser.add_argument("name", help="a published checkpoint, such as 'Wan 1.3B', 'LTX 2B 0.9.0' or 'Mochi'")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn: cuda is faster")
    parser.add_argument("--layers", type=int, help="of the transformer (default: all)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    write(arguments.name, arguments.folder, dtype=dtype, device=arguments.device, layers=arguments.layers)


if __name__ == "__main__":
    main()
