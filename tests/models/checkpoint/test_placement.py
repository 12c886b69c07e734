"""Device and type: what is asked for, or the best that is there; a device that is not there is said."""

import pytest
import torch

from steerserve.errors import SteerserveError
from steerserve.models.checkpoint.placement import choose_device, choose_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_a_device_that_is_named_is_taken() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "meta", "cpu:0", "mps"])
def test_a_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(SteerserveError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        choose_device(name)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SteerserveError, match="device cuda:99 is not there"):
        choose_device("cuda:99")


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_is_chosen_by_what_is_fast(monkeypatch: pytest.MonkeyPatch, tiles: bool, stored: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert choose_dtype("auto", CUDA, stored) == stored
    assert choose_dtype("auto", CPU, stored) == (
        torch.bfloat16 if tiles and stored == torch.bfloat16 else torch.float32
    )


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_named_is_taken(name: str) -> None:
    for device in (CPU, CUDA):
        assert str(choose_dtype(name, device, torch.float32)) == f"torch.{name}"


def test_a_type_that_nothing_runs_in_is_loaded_as_float32() -> None:
    assert choose_dtype("auto", CUDA, torch.float64) == torch.float32
