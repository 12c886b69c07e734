"""Matrix products round a row alike beside any number of others, on as many threads as there are."""

import os
import subprocess
import sys

import pytest
import torch

from steerserve.numerics import STRICT

ROWS_THAT_DIFFER = """
import torch
from steerserve.numerics import round_rows_alike
changed = round_rows_alike() if {asked} else False
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
differ = 0
for inner, width in ((1536, 384), (384, 1536)):
    x, w = torch.randn(300, inner, generator=generator), torch.randn(width, inner, generator=generator)
    whole = torch.nn.functional.linear(x, w)
    differ += sum(not torch.equal(torch.nn.functional.linear(x[:n], w), whole[:n]) for n in (16, 20, 58, 100, 192))
print(int(changed), differ)
"""


def run(asked: bool, **environment: str) -> tuple[bool, int]:
    plain = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    code = [sys.executable, "-c", ROWS_THAT_DIFFER.format(asked=asked)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, env=plain | environment)
    changed, differ = done.stdout.split()
    return changed == "1", int(differ)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in STRICT or not torch._C.has_mkl, reason="MKL has no strict mode here"
)
def test_rows_are_rounded_alike_beside_any_number_of_others() -> None:
    assert run(True) == (True, 0)


def test_a_mode_of_the_caller_is_left_alone() -> None:
    assert not run(True, MKL_CBWR="COMPATIBLE")[0]
