"""What a checkpoint of the diffusers backend takes of a GPU: its weights. Standard library only.

What the library's networks have alive beside them is not predicted: any pipeline class may stand here.
"""

from __future__ import annotations

from vidgen.models.diffusers.params import Params


def components(params: Params) -> dict[str, tuple[int, str]]:
    """(numbers, dtype) of each component with weights, as the backend loads them."""
    chosen = dict(params.options.dtypes)
    return {name: (numbers, chosen.get(name, params.dtype)) for name, (_, numbers) in params.weights}


def quantized(params: Params) -> tuple[str, ...]:
    """The components that `engine.quantization` is about."""
    wanted = dict(params.options.quantization).get("components", (params.denoiser,))
    return (wanted,) if isinstance(wanted, str) else tuple(wanted)
