"""Git LFS pointers: every reader of a downloaded file says that the file was not fetched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerserve.errors import ArtifactError
from steerserve.models import load_tokenizer, read_config, read_sampler_defaults
from steerserve.models.checkpoint.weights import read_weights
from steerserve.pickles import load_pickle
from steerserve.pointers import refuse_pointer
from steerserve.saes.layouts.files import read_json, read_safetensors
from steerserve.saes.layouts.gemma_scope import read_archive
from steerserve.steering.attribute import load_attribute
from steerserve.steering.probe import read_probe
from steerserve.steering.vectors import load_vectors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: read_config(path.parent),
    "model.safetensors": lambda path: read_weights(path.parent),
    "pytorch_model.bin": lambda path: read_weights(path.parent),
    "last.ckpt": lambda path: read_weights(path.parent),
    "ae.pt": load_pickle,
    "params.npz": read_archive,
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer_config.json": lambda path: load_tokenizer(path.parent),
    "vocab.json": lambda path: load_tokenizer(path.parent),
    "merges.txt": lambda path: load_tokenizer(path.parent),
    "vocab.txt": lambda path: load_tokenizer(path.parent),
    "chat_template.jinja": lambda path: load_tokenizer(path.parent),
    "generation_config.json": lambda path: read_sampler_defaults(path.parent),
    "sae_weights.safetensors": read_safetensors,
    "cfg.json": read_json,
    "vector.safetensors": lambda path: load_vectors(path, 3, 32),
    "vector.gguf": lambda path: load_vectors(path, 3, 32),
    "attribute.json": lambda path: load_attribute(path.parent, "5eed", 3, 32),
    "probe.safetensors": lambda path: read_probe(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_tells_a_pointer_from_a_broken_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER, encoding="utf-8")
    with pytest.raises(ArtifactError, match=f"{name} is a Git LFS pointer, not the file itself"):
        READERS[name](tmp_path / name)


def test_a_file_that_only_mentions_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"version": "https://git-lfs"}', encoding="utf-8")
    refuse_pointer(tmp_path / "a.json")
    refuse_pointer(tmp_path / "missing.json")
