"""Check that a model fits into memory: the bytes it takes, and those that are available."""

import os
from pathlib import Path

import torch

from steerserve.errors import ArtifactError
from steerserve.models.checkpoint.placement import type_name

UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def check_room(name: str, parameters: int, dtype: torch.dtype, others: int, available: int | None) -> str:
    """Say in a line what memory a model takes and what is available; raises ArtifactError where it cannot fit.

    others: bytes that are to be loaded beside it; available: None where it cannot be known. Weights that stay mapped
    count too: they must be in memory to be used.
    """
    need = parameters * dtype.itemsize
    beside = f" and {amount(others)} of SAEs" if others else ""
    takes = f"{name}: {count(parameters)} parameters, {amount(need)} in {type_name(dtype)}{beside}"
    if available is None:
        return f"{takes}; how much memory is available is not known"
    if need + others > available:
        half = parameters * torch.bfloat16.itemsize + others
        hint = "; --dtype bfloat16 would fit" if dtype == torch.float32 and half <= available else ""
        raise ArtifactError(f"{takes} do not fit: {amount(available)} available{hint}")
    return f"{takes}; {amount(available)} available"


def available_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory that can still be taken on a device; None where the system does not tell.

    On the CPU: the kernel's MemAvailable, or less where a control group (version 1 or 2) of this process allows less.
    Pages of files count as available: they can be dropped.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [_kernel_available(root), *_group_available(root)]
    return min((bytes_ for bytes_ in found if bytes_ is not None), default=None)


def amount(size: int) -> str:
    """A number of bytes as people say it."""
    for unit, scale in UNITS:
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def count(parameters: int) -> str:
    """A number of parameters as people say it."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= scale:
            return f"{parameters / scale:.1f} {unit}"
    return str(parameters)


def _kernel_available(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _group_available(root: Path) -> list[int]:
    """What each control group that holds this process still allows: its own and all above it."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", os.pardir)]
        # In a container the path may be the host's, which is not mounted: the mount's root is then the group itself.
        for depth in range(len(parts) + 1):
            group = mount.joinpath(*parts[:depth])
            most, taken = _number(group / limit), _number(group / used)
            if most is not None and taken is not None:
                found.append(max(0, most - taken + _file_pages(group)))
    return found


def _file_pages(group: Path) -> int:
    """Bytes of a group's pages that belong to files and can be dropped."""
    stats = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
    return sum(int(stats.get(f"total_{name}", stats.get(name, 0))) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    """The number a file holds; None where there is no such file, or it says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or a file that this container does not show
        return []
