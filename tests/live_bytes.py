"""How much memory a network takes, without any: all tensors that are alive at a time, counted on the meta device.

During a 3D convolution in half precision its input and its output count once more: cuDNN lays both out anew. So
counted, diffusers' networks give what was measured on a GPU; `tests/test_memory.py` says how near.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF = (torch.bfloat16, torch.float16)


class Fused(TorchFunctionMode):
    """Attention and RMS norm as a GPU has them, in one kernel: on the meta device they fall apart into many."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
            return given[0].new_empty(*given[0].shape[:-1], given[2].shape[-1])
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


class Alive(TorchDispatchMode):
    """`peak` is the most bytes that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.now += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.device.type == "meta"]
        for tensor in made:
            self.count(tensor)
        again = 0
        if "conv" in str(func) and made and made[0].ndim == 5 and made[0].dtype in HALF:
            again = args[0].nbytes + made[0].nbytes
        if self.now + again > self.peak:  # else it does not matter how many of them have gone
            self._forget()
            self.peak = max(self.peak, self.now + again)
        return out

    def _forget(self) -> None:
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:
            self.now -= self._storages.pop(key)[1]


@torch.inference_mode()
def fullest(run: Callable[[], Any], *inputs: Any) -> int:
    """Bytes at the fullest moment of `run`, `inputs` included and whatever else was there before (weights) not."""
    with Fused(), Alive() as alive:
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, torch.Tensor):
                alive.count(tensor)
        run()
    return alive.peak
