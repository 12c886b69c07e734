"""Vectors of other tools: each layout's layers as its author numbers them, and nothing that cannot be told."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.steering.vectors import NamedVector, load_vectors

LAYERS, HIDDEN = 4, 6


def row(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def stored(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata)
    return path


def control(path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """A control vector as llama.cpp and repeng write it, through the package's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> dict[str, NamedVector]:
    return load_vectors(path, LAYERS, HIDDEN)


def holds(vector: NamedVector, raw: Mapping[int, Tensor]) -> bool:
    """Whether a vector is those raw directions, made unit, with their norms."""
    return list(vector.layers) == sorted(raw) == list(vector.norms) and all(
        vector.layers[layer].dtype == torch.float32
        and torch.allclose(vector.layers[layer], tensor / tensor.norm(), atol=1e-6)
        and vector.norms[layer] == pytest.approx(float(tensor.norm()), rel=1e-5)
        for layer, tensor in raw.items()
    )


@pytest.mark.parametrize("scheme", ["layer", "layers", "direction"])
def test_a_tensor_a_layer_is_one_vector_named_by_the_file(tmp_path: Path, scheme: str) -> None:
    path = stored(tmp_path / "happy.v2.safetensors", {f"{scheme}.3": row(3, 7.0), f"{scheme}.0": row(0)})
    (vector,) = load(path).values()
    assert vector.name == "happy.v2" and vector.source == "happy.v2.safetensors"
    assert holds(vector, {0: row(0), 3: row(3, 7.0)})
    assert vector.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_keys_with_names_are_a_vector_each(tmp_path: Path) -> None:
    tensors = {"happy.layer.1": row(1), "happy.layer.2": row(2), "very.sad.direction.1": row(3), "layers.0": row(4)}
    found = load(stored(tmp_path / "moods.safetensors", tensors))
    assert sorted(found) == ["moods", "moods/happy", "moods/very.sad"]
    assert holds(found["moods/happy"], {1: row(1), 2: row(2)})
    assert holds(found["moods/very.sad"], {1: row(3)}) and holds(found["moods"], {0: row(4)})


def test_a_stack_has_a_row_a_layer_and_zeros_where_there_is_none(tmp_path: Path) -> None:
    stack = torch.stack([torch.zeros(HIDDEN), row(1), row(2), torch.zeros(HIDDEN)])
    (vector,) = load(stored(tmp_path / "v.safetensors", {"vectors": stack})).values()
    assert holds(vector, {1: row(1), 2: row(2)})


def test_one_tensor_takes_its_layer_from_the_metadata(tmp_path: Path) -> None:
    (vector,) = load(stored(tmp_path / "v.safetensors", {"steering": row(5)}, {"layer": "2"})).values()
    assert holds(vector, {2: row(5)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    (vector,) = load(stored(tmp_path / "v.safetensors", {"layer.1": row(1).to(dtype)})).values()
    assert holds(vector, {1: row(1).to(dtype).float()})


@given(st.floats(1e-30, 1e30), st.integers(0, LAYERS - 1))
def test_directions_are_unit_whatever_their_norm(
    tmp_path_factory: pytest.TempPathFactory, scale: float, layer: int
) -> None:
    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    (vector,) = load(stored(path, {f"layer.{layer}": torch.full((HIDDEN,), scale)})).values()
    torch.testing.assert_close(vector.layers[layer], torch.full((HIDDEN,), HIDDEN**-0.5))
    assert vector.norms[layer] == pytest.approx(scale * HIDDEN**0.5, rel=1e-5)


def test_a_control_vectors_direction_i_belongs_to_the_output_of_block_i(tmp_path: Path) -> None:
    directions = {i: row(i, 3.0).numpy() for i in (1, 2, 3)}
    path = control(tmp_path / "happy.gguf", {f"direction.{i}": one for i, one in directions.items()})
    (vector,) = load(path).values()
    assert vector.name == "happy" and vector.source == "happy.gguf"
    assert holds(vector, {i: torch.from_numpy(one) for i, one in directions.items()})
    assert vector.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_half_precision_control_vector_is_read(tmp_path: Path) -> None:
    half = row(2).numpy().astype(np.float16)
    (vector,) = load(control(tmp_path / "v.gguf", {"direction.2": half})).values()
    assert holds(vector, {2: torch.from_numpy(half).float()})


def test_a_folder_is_read_to_any_depth_and_named_by_path(tmp_path: Path) -> None:
    stored(tmp_path / "topic" / "sports.safetensors", {"layer.1": row(1)})
    stored(tmp_path / "mood" / "deep" / "two.safetensors", {"a.layer.1": row(2), "b.layer.1": row(3)})
    control(tmp_path / "happy.gguf", {"direction.1": row(4).numpy()})
    (tmp_path / "README.md").write_text("not a vector")
    found = load(tmp_path)
    assert sorted(found) == ["happy", "mood/deep/two/a", "mood/deep/two/b", "topic/sports"]
    assert all(name == vector.name for name, vector in found.items())
    assert found["topic/sports"].source == "topic/sports.safetensors"
    assert load(tmp_path / "topic" / "sports.safetensors")["sports"].source == "sports.safetensors"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "of another width": (lambda p: stored(p / "v.safetensors", {"layer.1": torch.ones(7)}), r"layer 1 is \[7\], expec"),
    "of another rank": (lambda p: stored(p / "v.safetensors", {"layer.1": torch.ones(1, HIDDEN)}), r"is \[1, 6\]"),
    "of a layer beyond": (lambda p: stored(p / "v.safetensors", {"layer.4": row(1)}), "layer 4, but .* layers 0 to 3"),
    "with NaN": (lambda p: stored(p / "v.safetensors", {"layer.1": row(1) * float("nan")}), "layer 1 is not finite"),
    "with infinity": (lambda p: stored(p / "v.safetensors", {"layer.1": row(1) / 0}), "not finite"),
    "of zeros": (lambda p: stored(p / "v.safetensors", {"layer.1": torch.zeros(HIDDEN)}), "layer 1 is all zero"),
    "of whole numbers": (
        lambda p: stored(p / "v.safetensors", {"layer.1": torch.ones(HIDDEN, dtype=torch.int64)}),
        "are torch.int64",
    ),
    "twice": (lambda p: stored(p / "v.safetensors", {"layer.1": row(1), "layers.01": row(2)}), "a second direction of"),
    "without a layer": (
        lambda p: stored(p / "v.safetensors", {"happy": row(1)}),
        "cannot tell the layers of .*'happy'",
    ),
    "with a strange key": (lambda p: stored(p / "v.safetensors", {"layer.1": row(1), "bias": row(2)}), "cannot tell"),
    "of a negative layer": (lambda p: stored(p / "v.safetensors", {"layer.-1": row(1)}), "cannot tell"),
    "with a layer of text": (
        lambda p: stored(p / "v.safetensors", {"v": row(1)}, {"layer": "last"}),
        "metadata layer must be a whole number, got 'last'",
    ),
    "without tensors": (lambda p: stored(p / "v.safetensors", {}), "cannot tell the layers"),
    "a stack of too many": (
        lambda p: stored(p / "v.safetensors", {"v": torch.ones(LAYERS + 1, HIDDEN)}),
        "5 rows, but the model has 4 layers",
    ),
    "a stack of zeros": (
        lambda p: stored(p / "v.safetensors", {"v": torch.zeros(LAYERS, HIDDEN)}),
        "every direction is all zero",
    ),
    "a stack of another width": (lambda p: stored(p / "v.safetensors", {"v": torch.ones(LAYERS, 7)}), r"0 is \[7\]"),
    "a model": (lambda p: control(p / "v.gguf", {"direction.1": row(1).numpy()}, "llama"), "architecture is 'llama'"),
    "a control vector beyond": (lambda p: control(p / "v.gguf", {"direction.4": row(1).numpy()}), "layer 4, but"),
    "a control vector of another width": (
        lambda p: control(p / "v.gguf", {"direction.1": np.ones(7, np.float32)}),
        r"layer 1 is \[7\]",
    ),
    "a control vector of zeros": (
        lambda p: control(p / "v.gguf", {"direction.1": np.zeros(HIDDEN, np.float32)}),
        "all zero",
    ),
    "a control vector of whole numbers": (
        lambda p: control(p / "v.gguf", {"direction.1": np.ones(HIDDEN, np.int32)}),
        "'direction.1' is I32",
    ),
    "a control vector with more": (
        lambda p: control(p / "v.gguf", {"direction.1": row(1).numpy(), "bias": row(2).numpy()}),
        r"holds tensors direction.N, got \['bias'\]",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_vector_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    path = make(tmp_path)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    whole = (
        stored(tmp_path / "v.safetensors", {"layer.1": row(1), "layer.2": row(2)})
        if suffix == ".safetensors"
        else control(tmp_path / "v.gguf", {"direction.1": row(1).numpy(), "direction.2": row(2).numpy()})
    )
    data = whole.read_bytes()
    # The writer pads a GGUF file behind its last number.
    whole.write_bytes(data[: int(share * (len(data) - 32))])
    with pytest.raises(ArtifactError, match="is not a whole"):
        load(whole)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save({"layer.1": row(1)}, path)
    with pytest.raises(ArtifactError, match=r"suffix is '.pt', allowed are \['.safetensors', '.gguf'\]"):
        load(path)
    with pytest.raises(ArtifactError, match="has no vectors"):
        load(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "none")


def test_two_vectors_of_one_name_are_refused(tmp_path: Path) -> None:
    stored(tmp_path / "mood.safetensors", {"happy.layer.1": row(1)})
    stored(tmp_path / "mood" / "happy.safetensors", {"layer.1": row(2)})
    with pytest.raises(ArtifactError, match="a second vector named 'mood/happy', beside mood"):
        load(tmp_path)


def test_without_the_package_a_control_vector_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = control(tmp_path / "happy.gguf", {"direction.1": row(1).numpy()})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArtifactError, match="needs the gguf package: pip install .*gguf"):
        load(path)
