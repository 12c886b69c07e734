"""Where a model runs, and in which type."""

import torch

from steerserve.errors import SteerserveError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of a name: `auto` is CUDA where there is any, else the CPU; raises SteerserveError for one that is not
    there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (":" in name and not index.isdecimal()):
        raise SteerserveError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= present:
        raise SteerserveError(f"device {name} is not there: this machine has {present} CUDA devices that torch can use")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type of a name. `auto` is the checkpoint's own on CUDA; on the CPU bfloat16 where the checkpoint is and the
    CPU has AMX tiles, else float32, since without them bfloat16 products are slower."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return stored if stored in DTYPES.values() else torch.float32
    tiles = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if tiles and stored == torch.bfloat16 else torch.float32


def type_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
