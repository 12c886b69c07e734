"""`steerserve inspect sae`: facts of one SAE, a list of several, and scores on a model's states on text."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerserve.cli import main
from tests.conftest import SENTENCES

HIDDEN, LAYERS = 32, 2


def write(folder: Path, layer: int = 1, hidden: int = HIDDEN, offset: float = 0.0, **metadata: Any) -> Path:
    """An SAE whose features are the coordinates and their opposites, so that it rebuilds every state exactly; with
    an offset, every state with that error in each coordinate."""
    folder.mkdir(parents=True)
    place = {"hook_name": f"blocks.{layer}.hook_resid_post"} | metadata
    config = {"architecture": "standard", "d_in": hidden, "d_sae": 2 * hidden, "metadata": place}
    (folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    both = torch.cat([torch.eye(hidden), -torch.eye(hidden)])
    weights = {"W_enc": both.T.contiguous(), "W_dec": both, "b_enc": torch.zeros(2 * hidden)}
    save_file(weights | {"b_dec": torch.full((hidden,), offset)}, folder / "sae_weights.safetensors")
    return folder


def found(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    assert main(["inspect", "sae", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["inspect", "sae", *command]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_one_sae_is_shown_with_its_norms_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = found(capsys, str(write(tmp_path / "layer-1-mask", policy="mask")))
    assert (shown["kind"], shown["facts"]["layer"], shown["facts"]["policy"]) == ("sae", 1, "mask")
    assert shown["facts"]["decoder_norm"] == {"min": 1.0, "mean": 1.0, "max": 1.0}
    assert {row["name"]: row["shape"] for row in shown["tensors"]}["W_dec"] == [2 * HIDDEN, HIDDEN]
    assert main(["inspect", "sae", str(tmp_path / "layer-1-mask")]) == 0
    assert "decoder_norm" in capsys.readouterr().out


def test_a_folder_of_several_is_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "deep" / "one", layer=0)
    write(tmp_path / "two", layer=1, policy="visible")
    shown = found(capsys, str(tmp_path))
    assert [(row["id"], row["layer"], row["policy"]) for row in shown["saes"]] == [
        ("deep/one", 0, None),
        ("two", 1, "visible"),
    ]
    assert [row["id"] for row in found(capsys, str(tmp_path), "--sae-layers", "1")["saes"]] == ["two"]
    assert main(["inspect", "sae", str(tmp_path)]) == 0
    assert "deep/one" in capsys.readouterr().out


def test_scores_are_those_of_what_is_rebuilt(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "exact")
    write(tmp_path / "off", offset=3.0)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SENTENCES[:40]))
    command = (str(tmp_path), "--model", str(tiny_model), "--device", "cpu", "--dtype", "float32", "--text", str(texts))
    exact, off = found(capsys, *command)["saes"]
    for policy in ("masked", "visible"):
        scores = exact[f"at {policy} positions"]
        assert scores["explained_variance"] == 1.0 and scores["active_features_per_token"] == HIDDEN
        assert scores["tokens"] > 100
        # An error of 3 in each coordinate, over the spread of the states round their mean.
        error = 9.0 * HIDDEN
        lost = 1 - off[f"at {policy} positions"]["explained_variance"]
        assert 0 < error / lost < scores["residual_norm"] ** 2 * 1.5
    assert exact["at masked positions"]["tokens"] < exact["at visible positions"]["tokens"]
    assert main(["inspect", "sae", *command]) == 0
    assert capsys.readouterr().out.count("1.0000") == 2


def test_texts_are_strings_lines_or_rows(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write(tmp_path / "s"))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES[:5]))
    (tmp_path / "lines.txt").write_text("\n\n".join(SENTENCES[:5]) + "\n")
    base = (folder, "--model", str(tiny_model), "--device", "cpu", "--text")
    given = [SENTENCES[:5], (str(tmp_path / "rows.jsonl"),), (str(tmp_path / "lines.txt"),)]
    facts = [found(capsys, *base, *texts)["facts"]["at masked positions"] for texts in given]
    assert facts[0] == facts[1] == facts[2]


def test_what_does_not_belong_together_is_one_line(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, deep, wide = (
        str(folder)
        for folder in (write(tmp_path / "g"), write(tmp_path / "d", layer=7), write(tmp_path / "w", hidden=8))
    )
    model = ("--model", str(tiny_model), "--text", SENTENCES[0])
    assert "--text and --model need each other" in failed(capsys, good, "--text", "x")
    assert "layer 7, but the model has layers 0 to 1" in failed(capsys, deep, *model)
    assert "hidden size 8, but the model's is 32" in failed(capsys, wide, *model)
    assert "positions to score" in failed(capsys, good, "--model", str(tiny_model), "--text", "")
    assert "has no SAE of layers [5]" in failed(capsys, str(tmp_path), "--sae-layers", "5")
    assert "--sae-layers: '1;2'" in failed(capsys, good, "--sae-layers", "1;2")


def test_a_plain_installation_can_score(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "s")
    code = (
        "import sys; sys.modules |= dict.fromkeys(('sae_lens', 'sklearn', 'scipy'));"
        "from steerserve.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["inspect", "sae", str(tmp_path / "s"), "--model", str(tiny_model), "--text", *SENTENCES[:3]]
    assert subprocess.run([sys.executable, "-c", code, *command], check=False, capture_output=True).returncode == 0
