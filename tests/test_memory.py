"""The allocator setting: freed memory is used again instead of being faulted in anew."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_SECOND_BUFFER = """
import resource
from steerserve.memory import keep_freed_memory
changed = keep_freed_memory() if {keep} else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = bytearray(b"x") * 50_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(changed), faults())
"""


def run(keep: bool, **environment: str) -> tuple[bool, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = [sys.executable, "-c", FAULTS_OF_A_SECOND_BUFFER.format(keep=keep)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, env=plain | environment)
    changed, faults = done.stdout.split()
    return changed == "1", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_freed_buffer_is_used_again() -> None:
    pages = 50_000_000 // os.sysconf("SC_PAGE_SIZE")
    changed, faults = run(keep=True)
    assert changed
    assert faults < pages / 100


def test_settings_of_the_caller_are_left_alone() -> None:
    assert not run(keep=True, MALLOC_ARENA_MAX="2")[0]
