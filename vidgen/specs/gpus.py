"""Data sheets of GPUs: memory and dense bf16 throughput. Standard library only; refuses to know which one is there.

`memory` is the total that nvidia-smi reports, which is what a process can count on: less than the name says where error
correction takes its part. `tflops` are dense bf16 tensor-core operations with fp32 accumulation, from NVIDIA's data
sheets; where a sheet gives the figure "with sparsity", half of it:

    B200       HGX B200 data sheet: 4.5 PFLOPS sparse
    H200, H100 H100 and H200 Tensor Core GPU data sheets: 1,979 (SXM), 1,671 (NVL) and 1,513 (PCIe) sparse
    A100       A100 Tensor Core GPU data sheet: 312
    L40S, L40, L4  data sheets: 733, 362 and 242 sparse
    A10G       AWS' own A10 with fewer tensor cores: 70 (its data sheet); A10: 125
    RTX        Ada, Ampere and Blackwell GPU architecture whitepapers, appendix A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes of memory, and 10^12 dense bf16 operations a second."""

    memory: int
    tflops: float


GPUS: Mapping[str, Gpu] = {
    "B200": Gpu(183_359 * MIB, 2250.0),
    "H200": Gpu(143_771 * MIB, 989.5),
    "H100": Gpu(81_559 * MIB, 989.5),
    "H100-NVL": Gpu(95_830 * MIB, 835.5),
    "H100-PCIe": Gpu(81_559 * MIB, 756.5),
    "A100-80GB": Gpu(81_920 * MIB, 312.0),
    "A100-40GB": Gpu(40_960 * MIB, 312.0),
    "L40S": Gpu(46_068 * MIB, 366.5),
    "L40": Gpu(46_068 * MIB, 181.0),
    "A10G": Gpu(23_028 * MIB, 70.0),
    "A10": Gpu(23_028 * MIB, 125.0),
    "L4": Gpu(23_034 * MIB, 121.0),
    "RTX-6000-Ada": Gpu(49_140 * MIB, 364.2),
    "RTX-A6000": Gpu(49_140 * MIB, 154.8),
    "RTX-5090": Gpu(32_607 * MIB, 209.5),
    "RTX-4090": Gpu(24_564 * MIB, 165.2),
    "RTX-3090": Gpu(24_576 * MIB, 71.0),
}
"""By the name that `parallel.gpu` takes."""
