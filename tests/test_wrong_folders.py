"""Wrong folders on the command line: one clear line on standard error, exit code 2, nothing served."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steerserve.cli import main
from tests import tiny
from tests.calibrate.made import make_data, make_family, make_saes

Breaking = Callable[[Path], None]


def edit(name: str, **changes: object) -> Breaking:
    """Change keys of a JSON file; a key given as ... is taken out."""

    def apply(folder: Path) -> None:
        raw = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return apply


def put(name: str, content: str | bytes) -> Breaking:
    """Write a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def remove(pattern: str) -> Breaking:
    """Remove the files and folders that fit."""

    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def truncate(name: str) -> Breaking:
    """Cut off the end of a file."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-64])

    return apply


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def untouched(folder: Path) -> None:
    assert folder.is_dir()


def other_family(folder: Path) -> None:
    shutil.copy(folder.parent / "sedd" / "config.json", folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {}, "trainer": pickled}, folder / "pytorch_model.bin")


def hook(layer: int, **metadata: object) -> dict[str, object]:
    return {"hook_name": f"blocks.{layer}.hook_resid_post", "policy": "mask", **metadata}


SAE = "layer-0-mask/cfg.json"
MODELS: dict[str, tuple[Breaking, str]] = {
    "a file": (a_file, "is not a folder"),
    "nothing": (nothing, "is not a folder"),
    "empty": (remove("*"), "no model folder: it has no config.json"),
    "no weights": (remove("model.safetensors"), "has no model.safetensors"),
    "broken config": (put("config.json", "{"), "config.json is not JSON"),
    "binary config": (put("config.json", b"\xff\xfe"), "config.json is not JSON"),
    "other config": (put("config.json", "[]"), "must hold a JSON object"),
    "unknown family": (
        edit("config.json", model_type="mamba"),
        "model_type is 'mamba', known families are Dream, .* sedd",
    ),
    "a family that is not served": (
        edit("config.json", model_type="diffusion_gemma"),
        "model_type 'diffusion_gemma' is not served.*Missing for it: its encoder with its cache",
    ),
    "missing key": (edit("config.json", d_model=...), "config.json has no d_model, which the llada family needs"),
    "other shape": (edit("config.json", n_layers=3), "missing tensors: model.transformer"),
    "other family": (other_family, "(missing|unexpected) tensors"),
    "truncated": (truncate("model.safetensors"), "is not a whole safetensors file"),
    "a pickle with code": (pickled, "pytorch_model.bin is a pickle that asks for .*code is never run"),
}
TOKENIZERS: dict[str, tuple[Breaking, str]] = {
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json.*--tokenizer DIR"),
    "broken tokenizer": (put("tokenizer.json", "{}"), "is not a tokenizer"),
}
SERVED: dict[str, tuple[Breaking, str]] = {
    "too many tokens": (edit("config.json", vocab_size=20), r"the tokenizer has \d+ tokens, the model 20"),
    "broken template": (
        put("tokenizer_config.json", '{"chat_template": "{% for %}"}'),
        "chat template cannot be read",
    ),
    "unknown order": (put("generation_config.json", '{"order": "best"}'), "generation_config.json: .*best.*confidence"),
    "broken defaults": (put("generation_config.json", "["), "is not JSON"),
}
SAES: dict[str, tuple[Breaking, str]] = {
    "a file": (a_file, "is not a folder"),
    "empty": (remove("*"), "(holds no SAE|no SAE)"),
    "of another model": (
        edit(SAE, metadata=hook(0, model_sha256="00" * 32)),
        "layer-0-mask: trained on the model 0000",
    ),
    "of a layer that is not there": (edit(SAE, metadata=hook(7)), "layer 7, but the model has layers 0 to 1"),
    "truncated": (truncate("layer-0-mask/sae_weights.safetensors"), "layer-0-mask"),
    "broken config": (put(SAE, "{"), "cfg.json"),
}
ATTRIBUTES: dict[str, tuple[Breaking, str]] = {
    "a file": (a_file, "is not a folder"),
    "empty": (remove("*"), "holds no attribute"),
    "of another model": (untouched, "topic/sports.*model"),
    "broken": (put("sports/attribute.json", "{"), "attribute"),
    "truncated": (truncate("sports/directions.safetensors"), "sports"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Folders that belong together: model, saes, data; another family's; an attribute of another model."""
    folder = tmp_path_factory.mktemp("good")
    make_family(folder / "model", "llada", tiny_model)
    make_family(folder / "sedd", "sedd", tiny_model)
    make_saes(folder / "saes", folder / "model")
    make_data(folder / "data")
    tiny.attribute(folder / "attributes" / "sports", "topic/sports", (1,))
    return folder


@pytest.fixture
def folder(tmp_path: Path, good: Path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(good, tmp_path / "copy")


def refused(capsys: pytest.CaptureFixture[str], command: list[str | Path], said: str) -> None:
    assert main([str(part) for part in command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"steerserve: [^\n]*{said}[^\n]*\n", printed.err), printed.err


def commands(folder: Path) -> dict[str, list[str | Path]]:
    model, out = folder / "model", folder / "out"
    return {
        # Whatever port is free: none of these folders is good enough for a server to listen.
        "serve": ["serve", "--model", model, "--port", "0"],
        "generate": ["generate", "the", "--model", model],
        "inspect": ["inspect", "model", model],
        "calibrate": ["calibrate", "--model", model, "--sae", folder / "saes", "--data", folder / "data", "--out", out],
    }


@pytest.mark.parametrize(
    ("wrong", "command"),
    [
        (wrong, command)
        for wrong in (*MODELS, *TOKENIZERS)
        for command in ("serve", "generate", "inspect", "calibrate")
        # A model without a tokenizer is shown.
        if (wrong, command) != ("no tokenizer", "inspect")
    ],
)
def test_a_wrong_model_folder(folder: Path, capsys: pytest.CaptureFixture[str], wrong: str, command: str) -> None:
    breaking, said = (MODELS | TOKENIZERS)[wrong]
    breaking(folder / "model")
    refused(capsys, commands(folder)[command], said)


def test_a_model_without_a_tokenizer_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove("tokenizer.json")(folder / "model")
    assert main(["inspect", "model", str(folder / "model"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert (facts["tokenizer_pieces"], facts["dtype"]) == (None, "float32")


@pytest.mark.parametrize("wrong", SERVED)
def test_a_model_folder_that_cannot_be_served(folder: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    breaking, said = SERVED[wrong]
    breaking(folder / "model")
    refused(capsys, commands(folder)["serve"], said)


@pytest.mark.parametrize("wrong", SAES)
def test_a_wrong_sae_folder(folder: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    breaking, said = SAES[wrong]
    breaking(folder / "saes")
    refused(capsys, [*commands(folder)["serve"], "--sae", folder / "saes"], said)
    refused(capsys, commands(folder)["calibrate"], said)


@pytest.mark.parametrize("wrong", ATTRIBUTES)
def test_a_wrong_attribute_folder(folder: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    breaking, said = ATTRIBUTES[wrong]
    breaking(folder / "attributes")
    refused(capsys, [*commands(folder)["serve"], "--attributes", folder / "attributes"], said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sha256", "00" * 32], "the weights have the sha256 [0-9a-f]{64}, not 0{64} as pinned"),
        (["--sha256", "abc"], "sha256 must be 64 hexadecimal digits, got 'abc'"),
        (["--device", "cuda:99"], "device cuda:99 is not there"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--tokenizer", "nowhere"], "--tokenizer: nowhere is not there"),
        (["--sae-k", "3"], "no folder of SAEs is named"),
        (["--sae-layers", "0,-1"], "sae_layers must be at least 0, got -1"),
        (["--revision", ""], "revision must not be empty"),
    ],
)
def test_a_wrong_pin_or_place(good: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    refused(capsys, [*commands(good)["serve"], *flags], said)
    refused(capsys, [*commands(good)["generate"], *flags], said)


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.models.loader.available_bytes", lambda _: 1000)
    said = r"model: [\d.]+ k parameters, [\d.]+ KiB in float32 do not fit: 1000 bytes available"
    refused(capsys, commands(good)["serve"], said)


def test_the_process_ends_with_the_line_and_the_code(good: Path) -> None:
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--model", str(good), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"steerserve: {good} is no model folder: it has no config.json\n"
