"""Weights on disk: mapped where they lie aligned, else copied; pickles read only as tensors; wrong files named."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.models import load_model, open_checkpoint, weights_sha256
from steerserve.models.checkpoint.weights import read_weights, weight_files
from tests import tiny
from tests.models.checkpoint.test_loading import MODELS, shard, write
from tests.test_alignment import move


def pickled(folder: Path, name: str = "pytorch_model.bin", **others: object) -> dict[str, Tensor]:
    """A LLaDA folder whose weights are a pickle; `others` beside a Lightning checkpoint's `state_dict`."""
    state = dict(write(folder, "llada").state_dict())
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state, **others} if name.endswith(".ckpt") else state, folder / name)
    return state


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def mapped_file(tensor: Tensor) -> str:
    """The file that the memory of a tensor belongs to; empty for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = (*line.split(maxsplit=5), "")[:6]
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return name
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_weights_of_the_wanted_type_stay_in_their_file(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    file = tmp_path / "model.safetensors"

    def places(dtype: torch.dtype) -> set[bool]:
        """Whether a tensor's memory is the file's, over all tensors."""
        return {mapped_file(one) == str(file) for one in load_model(tmp_path, dtype).state_dict().values()}

    move(file, 0)
    assert (places(torch.float32), places(torch.bfloat16)) == ({True}, {False})
    move(file, 8)
    assert places(torch.float32) == {False}, "off a 64-byte line they are copied"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    assert (places(torch.float32), places(torch.bfloat16)) == ({False}, {True})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt"])
def test_a_pickle_is_read_and_converted_once(tmp_path: Path, name: str) -> None:
    state = pickled(tmp_path, name)
    assert same(load_model(tmp_path).state_dict(), state)
    made = tmp_path / f"{name}.converted.safetensors"
    written = made.stat().st_mtime_ns
    assert open_checkpoint(tmp_path).weights.notes == (f"{name}: read from {made.name}",)
    assert same(load_model(tmp_path).state_dict(), state)
    assert made.stat().st_mtime_ns == written


def test_a_changed_pickle_is_converted_anew(tmp_path: Path) -> None:
    pickled(tmp_path)
    load_model(tmp_path)
    changed = {name: tensor + 1 for name, tensor in tiny.llada().state_dict().items()}
    torch.save(changed, tmp_path / "pytorch_model.bin")
    for _ in range(2):
        assert same(load_model(tmp_path).state_dict(), changed)


def test_a_pickle_that_cannot_be_converted_is_read_each_time(tmp_path: Path) -> None:
    state = pickled(tmp_path)
    (tmp_path / "pytorch_model.bin.converted.safetensors").mkdir()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.keep_converted() == ("pytorch_model.bin: not converted: the folder cannot be written to",)
    assert same(checkpoint.load(torch.float32).state_dict(), state)


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    state = pickled(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_model(tmp_path).state_dict(), state)
    assert len(list(tmp_path.glob("*.converted.safetensors"))) == 2
    assert same(load_model(tmp_path).state_dict(), state)


def test_of_a_lightning_checkpoint_the_state_is_taken_and_the_rest_is_said(tmp_path: Path) -> None:
    state = pickled(tmp_path, "last.ckpt", epoch=3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.notes == ("last.ckpt: its state_dict is taken, not its epoch",)
    assert same(checkpoint.load(torch.float32).state_dict(), state)


def test_of_a_lightning_checkpoint_with_averages_those_are_taken(tmp_path: Path) -> None:
    state = pickled(tmp_path, "last.ckpt")
    averages = [tensor + 1 for tensor in state.values()]
    torch.save({"state_dict": state, "ema": {"decay": 0.9999, "shadow_params": averages}}, tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.notes == ("last.ckpt: the averaged weights of its ema are taken",)
    assert same(checkpoint.load(torch.float32).state_dict(), dict(zip(state, averages, strict=True)))


@pytest.mark.parametrize("ema", [{}, {"shadow_params": []}, {"shadow_params": [torch.ones(2)]}, [1]])
def test_averages_that_do_not_fit_are_refused(tmp_path: Path, ema: object) -> None:
    pickled(tmp_path, "last.ckpt", ema=ema)
    with pytest.raises(ArtifactError, match="its ema has no shadow_params of the shapes"):
        open_checkpoint(tmp_path)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt"])
def test_a_checkpoint_with_code_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    pickled(tmp_path / "model", name)
    torch.save({"state_dict": {}, "x": Payload(tmp_path / "executed")}, tmp_path / "model" / name)
    with pytest.raises(ArtifactError, match=f"{name} is a pickle that asks for .*code is never run"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {}, {"a": 3}, {1: torch.ones(1)}, torch.ones(2), {"state_dict": {}}]
)
def test_a_pickle_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    pickled(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin.* tensors by name"):
        load_model(tmp_path)


def test_a_wrong_pickle_is_not_converted(tmp_path: Path) -> None:
    pickled(tmp_path)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="unexpected tensors: other"):
        load_model(tmp_path)
    assert not list(tmp_path.glob("*.converted.safetensors"))


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    pickled(tmp_path)
    write(tmp_path, "llada")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert read_weights(tmp_path).unconverted == {}


def test_which_of_two_checkpoints_is_not_guessed(tmp_path: Path) -> None:
    pickled(tmp_path, "last.ckpt")
    torch.save({}, tmp_path / "best.ckpt")
    with pytest.raises(ArtifactError, match="has 2 checkpoints"):
        load_model(tmp_path)


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no model\.safetensors, no pytorch_model\.bin and no single \*\.ckpt"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_hash_is_of_every_byte_of_the_weights(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)
    before = weights_sha256(tmp_path)
    assert before == weights_sha256(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert weights_sha256(tmp_path) != before


def test_the_hash_of_shards_is_that_of_their_bytes_in_order(tmp_path: Path) -> None:
    shard(tmp_path, "llada")
    whole = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("*.safetensors")))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").write_bytes(whole)
    assert weights_sha256(tmp_path) == weights_sha256(tmp_path / "whole")


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    tensors = dict(write(tmp_path, "llada").state_dict())
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"no floating-point numbers: {name} is torch.int8"):
        load_model(tmp_path)
