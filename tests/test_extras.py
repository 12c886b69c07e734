"""Optional dependencies: a command that needs one says so at once, with a command that works."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from steerserve.cli import main
from steerserve.extras import install_command


def test_the_command_that_installs_is_of_a_checkout_where_this_is_one() -> None:
    assert (Path(__file__).parents[1] / "constraints.txt").is_file()
    assert install_command("train") == "pip install -e '.[train]' -c constraints.txt"


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["calibrate", "--data", "{}", "--out", "{}/out"], "sklearn"),
        (["calibrate", "--data", "{}", "--profile", "{}"], "scipy"),
        (["train", "dlm", "--data", "{}", "--tokenizer", "{}", "--out", "{}/out"], "tqdm"),
        (["train", "sae", "--data", "{}", "--model", "{}", "--out", "{}/out", "--layers", "1"], "sae_lens"),
    ],
)
def test_what_is_missing_is_said_before_anything_slow(
    command: Sequence[str],
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else known(name, *rest))
    # The folder is empty: reading it would fail in another way.
    assert main([part.format(tmp_path) for part in command]) == 2
    said = capsys.readouterr().err
    assert f"this command needs {module}" in said and install_command("train") in said
    assert not (tmp_path / "out").exists()
