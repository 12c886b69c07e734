"""Pickled checkpoints: tensors come out, code does not run, and a conversion is used only for what it was made from."""

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.pickles import convert, converted, load_pickle


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


class Harmless:
    """An object of a class that no reader knows."""


def write(path: Path, value: object, form: str = "zip") -> Path:
    if form == "plain":
        with open(path, "wb") as stream:
            pickle.dump(value, stream)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return path


FORMS = pytest.mark.parametrize("form", ["zip", "old"])


@FORMS
def test_tensors_and_plain_values_are_read(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "ae.pt", {"weight": torch.arange(6.0).reshape(2, 3), "k": 5, "name": ["a", None]}, form)
    found = load_pickle(path)
    assert torch.equal(found["weight"], torch.arange(6.0).reshape(2, 3))
    assert (found["k"], found["name"]) == (5, ["a", None])


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_payload_does_not_run(tmp_path: Path, form: str) -> None:
    proof = tmp_path / "executed"
    path = write(tmp_path / "ae.pt", {"weight": torch.ones(2), "x": Payload(proof)}, form)
    with pytest.raises(ArtifactError, match=r"ae\.pt is a pickle that asks for .*code is never run") as error:
        load_pickle(path)
    assert not proof.exists()
    assert "\n" not in str(error.value)
    # The payload is a real one: read as pickles usually are, it runs.
    if form == "plain":
        with open(path, "rb") as stream:
            pickle.load(stream)
    else:
        torch.load(path, weights_only=False)
    assert proof.exists()


def test_an_object_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model.ckpt", {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": Harmless()})
    with pytest.raises(ArtifactError, match="Harmless"):
        load_pickle(path)


@FORMS
@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.97])
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, form: str, kept: float) -> None:
    path = write(tmp_path / "ae.pt", {"weight": torch.arange(4096.0)}, form)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(
        ArtifactError, match=r"ae\.pt is (not a whole torch checkpoint|a pickle that asks for)"
    ) as error:
        load_pickle(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"junk" * 64, b"\x80\x04.", b"\x80\x02]q\x00."])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ae.pt").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"ae\.pt"):
        load_pickle(tmp_path / "ae.pt")
    with pytest.raises(ArtifactError, match="nowhere"):
        load_pickle(tmp_path / "nowhere")


def tensors() -> dict[str, Tensor]:
    """Tied, transposed, sliced and empty tensors of several types."""
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "whole": whole,
        "tied": whole,
        "turned": whole.T,
        "row": whole[1],
        "half": whole.bfloat16(),
        "ids": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(2.0),
    }


def test_a_conversion_holds_the_same_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.pt", tensors())
    assert converted(path) is None
    assert convert(path, load_pickle(path)) == tmp_path / "ae.pt.converted.safetensors"
    found = converted(path)
    assert found is not None
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert {file.name for file in tmp_path.iterdir()} == {"ae.pt", "ae.pt.converted.safetensors"}


def test_a_conversion_can_be_read_by_whom_the_pickle_can(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.pt", tensors())
    path.chmod(0o644)
    made = convert(path, tensors())
    assert made is not None
    assert stat.S_IMODE(made.stat().st_mode) == 0o644


def test_a_conversion_of_another_pickle_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.pt", tensors())
    convert(path, tensors())
    write(path, {"whole": torch.zeros(1)})
    assert converted(path) is None
    convert(path, {"whole": torch.zeros(1)})
    found = converted(path)
    assert found is not None
    assert found.keys() == {"whole"}


def test_a_broken_conversion_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.pt", tensors())
    made = convert(path, tensors())
    assert made is not None
    for data in (made.read_bytes()[:-5], b"", b"junk" * 9):
        made.write_bytes(data)
        assert converted(path) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "ae.pt", tensors())
    # A folder stands where the file would go: that stops the super-user too, whom no permission does.
    (tmp_path / "ae.pt.converted.safetensors").mkdir()
    assert convert(path, tensors()) is None
    assert converted(path) is None
    assert {file.name for file in tmp_path.iterdir()} == {"ae.pt", "ae.pt.converted.safetensors"}
