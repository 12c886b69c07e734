"""Matrix products that round a row alike whatever stands beside it, and wherever its weights lie in memory.

MKL chooses how it splits a float32 product by its rows and by the number of threads, and the last bits follow:
with two threads a product of 1536 into 384 units rounds rows among 57 to 192 otherwise than among more. Its conditional
reproducibility with the strict flag forbids that, at no measurable cost.

Without that flag, a product with a single row also depends on addresses, on every kind of CPU: a matrix or vector that
does not start on a 64-byte line is summed in another order. Tensors mapped from a file start wherever the file's header
happens to end, so the same weights in two files would give different bits. `aligned` forbids that. Products in bfloat16
and float16 are not MKL's and do not depend on addresses.
"""

import os

import torch
from torch import Tensor

VARIABLE = "MKL_CBWR"
STRICT = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}
"""By what torch says of the CPU; MKL has no strict mode for others."""

LINE = 64
"""Bytes of a cache line; memory that torch allocates on the CPU starts on one."""


def round_rows_alike() -> bool:
    """Ask MKL for it; call it before the first matrix product of the process. Returns whether anything was changed.

    Nothing happens where torch comes without MKL, on CPUs that have no such mode, or where the caller has set MKL_CBWR.
    """
    mode = STRICT.get(torch.backends.cpu.get_cpu_capability())
    if mode is None or VARIABLE in os.environ or not torch._C.has_mkl:
        return False
    os.environ[VARIABLE] = mode
    return True


def aligned(tensor: Tensor) -> Tensor:
    """The same tensor, copied into memory of its own if its address could decide how its products are rounded.

    Only float32 and float64 tensors on the CPU that do not start on a 64-byte line are copied; strides stay as they
    are.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    return tensor.clone() if tensor.data_ptr() % LINE else tensor
