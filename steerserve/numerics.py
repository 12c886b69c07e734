"""Matrix products that round a row alike whatever stands beside it.

MKL chooses how it splits a float32 product by its rows and by the number of threads, and the last bits follow:
with two threads a product of 1536 into 384 units rounds rows among 57 to 192 otherwise than among more. Its conditional
reproducibility with the strict flag forbids that, at no measurable cost.
"""

import os

import torch

VARIABLE = "MKL_CBWR"
STRICT = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}
"""By what torch says of the CPU; MKL has no strict mode for others."""


def round_rows_alike() -> bool:
    """Ask MKL for it; call it before the first matrix product of the process. Returns whether anything was changed.

    Nothing happens where torch comes without MKL, on CPUs that have no such mode, or where the caller has set MKL_CBWR.
    """
    mode = STRICT.get(torch.backends.cpu.get_cpu_capability())
    if mode is None or VARIABLE in os.environ or not torch._C.has_mkl:
        return False
    os.environ[VARIABLE] = mode
    return True
