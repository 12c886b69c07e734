"""The command line: help, flags, exit codes, and every command once for real on a tiny model."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerserve.cli import build_parser, main
from steerserve.commands import batch, calibrate, generate, serve, train
from steerserve.commands.flags import FlagGroup
from steerserve.commands.serve import ready_lines
from steerserve.errors import RequestError
from steerserve.models import OpenedModel
from steerserve.steering.probe import Probe
from tests import tiny
from tests.conftest import SENTENCES
from tests.runtime.test_load import attributes

FOLDERS = ("--model", "--sae", "--data", "--out")
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("serve",): ("--model", "--sae", "--attributes", "--dtype", "--device", "--tokenizer", "--revision", "--sha256")
    + ("--sae-layers", "--sae-k", "--host", "--port", "--max-rows", "--max-queue"),
    ("generate",): ("--attribute", "--feature", "--steps", "--max-tokens", "--order", "--transfer", "--schedule")
    + ("--temperature", "--seed", "--baseline", "--json", "--scope", "--refine", "--max-kl"),
    ("batch",): ("--url", "--key-file", "--concurrency", "--retries", "--timeout", "--patience", "--retry-failed"),
    ("inspect",): ("--json",),
    ("train",): (),
    ("train", "tokenizer"): ("--data", "--out", "--encoder", "--size"),
    ("train", "dlm"): ("--data", "--tokenizer", "--out", "--encoder", "--tokens", "--context", "--hidden-size"),
    ("train", "sae"): ("--data", "--model", "--out", "--layers", "--features", "--k"),
    ("calibrate",): (*FOLDERS, "--profile", "--probes", "--probe-texts"),
}
GROUPS: dict[str, tuple[FlagGroup, tuple[str, ...]]] = {
    "model": (serve.MODEL, ("serve",)),
    "saes": (serve.SAES, ("serve",)),
    "server": (serve.SERVER, ("serve",)),
    "engine": (serve.ENGINE, ("serve",)),
    "engine of generate": (generate.ENGINE, ("generate",)),
    "generation": (generate.GENERATION, ("generate",)),
    "steering": (generate.STEERING, ("generate",)),
    "batch": (batch.BATCH, ("batch", "in", "out")),
    "dlm": (train.DLM, ("train", "dlm", "--data", "d", "--tokenizer", "t", "--out", "o")),
    "fresh": (train.FRESH, ("train", "dlm", "--data", "d", "--tokenizer", "t", "--out", "o")),
    "sae": (train.SAE, ("train", "sae", "--data", "d", "--model", "m", "--out", "o", "--layers", "0")),
    "calibration": (calibrate.RECIPE, ("calibrate", "--model", "m", "--sae", "s", "--data", "d", "--out", "o")),
    "measured profile": (calibrate.PROFILE, ("calibrate", "--model", "m", "--data", "d", "--profile", "a")),
    "probes": (calibrate.PROBES, ("calibrate", "--model", "m", "--data", "d", "--probes", "a")),
}


def leave(arguments: Sequence[str]) -> int:
    """The exit code of a command line, whether it returns or leaves."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_every_flag_and_shows_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"steerserve {' '.join(command)}" in text.split("example:")[1]
    for flag in COMMANDS[command]:
        assert re.search(rf"^ +{flag}\b", text, re.MULTILINE), flag


def test_help_of_the_whole_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("serve", "generate", "batch", "inspect", "train", "calibrate"))


@pytest.mark.parametrize("group", GROUPS)
def test_every_flag_has_a_help(group: str) -> None:
    flags, _ = GROUPS[group]
    assert [field.name for field in flags.fields() if not (field.help or (flags.helps or {}).get(field.name))] == []


def test_help_loads_neither_torch_nor_rich() -> None:
    code = "from steerserve.cli import build_parser; import sys; build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "rich", "fastapi", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("group", GROUPS)
def test_no_flag_leaves_every_default_of_the_dataclass(group: str) -> None:
    flags, command = GROUPS[group]
    assert flags.given(build_parser().parse_args(command)) == {}


@given(port=st.integers(0, 65535), rows=st.integers(1, 10_000), seconds=st.floats(0.01, 1e6))
def test_a_flag_that_is_given_reaches_its_field(port: int, rows: int, seconds: float) -> None:
    command = ["serve", "--port", str(port), "--max-rows", str(rows), "--keep-alive-seconds", repr(seconds)]
    arguments = build_parser().parse_args(command)
    server, engine = serve.SERVER.build(arguments), serve.ENGINE.build(arguments)
    assert (server.port, engine.max_rows, server.keep_alive_seconds) == (port, rows, seconds)
    assert server.host == type(server)().host


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--model", "nowhere"),
        ("serve", "--sae", "nowhere"),
        ("generate", "The", "--attributes", "nowhere"),
        ("inspect", "model", "nowhere"),
        ("inspect", "sae", "{empty}"),
        ("inspect", "model", "{empty}"),
        ("inspect", "attribute", "{empty}"),
        ("generate", "The", "--model", "{empty}"),
        ("train", "tokenizer", "--data", "{empty}", "--out", "{empty}/out"),
        ("train", "dlm", "--data", "{empty}", "--tokenizer", "{empty}", "--out", "{empty}/out"),
        ("train", "sae", "--data", "nowhere", "--model", "{empty}", "--out", "{empty}/out", "--layers", "0"),
        ("calibrate", "--data", "nowhere", "--model", "{empty}", "--sae", "{empty}", "--out", "{empty}/out"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--out", "{empty}/out"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--profile", "nowhere"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--profile", "{empty}", "--out", "{empty}/out"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--profile", "{empty}", "--texts", "5"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--profile", "{empty}", "--probe-texts", "5"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "nowhere"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "{empty}", "--out", "{empty}/out"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "{empty}", "--profile", "{empty}"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "{empty}", "--texts", "5"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "{empty}", "--runs", "5"),
        ("calibrate", "--data", "{empty}", "--model", "{empty}", "--probes", "{empty}", "--probe-texts", "0"),
        ("calibrate", "--data", "d", "--model", "m", "--sae", "s", "--out", "o", "--runs", "5"),
        ("calibrate", "--data", "{empty}", "--out", "{file}"),
        ("calibrate", "--data", "{empty}", "--out", "{file}/deep/out"),
        ("train", "tokenizer", "--data", "{empty}", "--out", "{file}"),
        ("train", "dlm", "--data", "{empty}", "--tokenizer", "{empty}", "--out", "{file}"),
        ("train", "sae", "--data", "{empty}", "--model", "{empty}", "--out", "{file}", "--layers", "0"),
        ("serve", "--port", "70000"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_exit_code_2(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"{empty}": str(tmp_path), "{file}": str(tmp_path / "file")}
    assert leave([re.sub(r"\{\w+\}", lambda found: places[found[0]], part) for part in command]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"steerserve: [^\n]+\n", error)
    assert "is a file, not a folder" in error or not any("{file}" in part for part in command)


def test_an_unknown_flag_is_refused_by_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["serve", "--prot", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("steerserve serve: error: unrecognized arguments: --prot 1 (did you mean --port?)")
    assert "`steerserve serve --help`" in error and error.count("\n") == 2
    assert leave(["train", "sae", "--laers=1"]) == 2
    assert capsys.readouterr().err.startswith("steerserve train sae: error: ")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--attribute", "topic/sports=much"),
        ("generate", "--feature", "812"),
        ("generate", "--feature", "layer-4-mask:x=1"),
        ("generate", "--schedule", "{"),
        ("generate", "--schedule", '{"start": 0}'),
        ("generate", "--steps", "few"),
        ("serve", "--prot", "1"),
        ("train",),
        (),
    ],
    ids=" ".join,
)
def test_a_flag_that_cannot_be_read_is_a_usage_error(command: tuple[str, ...]) -> None:
    assert leave(command) == 2


def test_pushes_are_read_from_the_command_line() -> None:
    arguments = build_parser().parse_args(
        ["generate", "The", "--attribute", "topic/sports=-0.5", "--attribute", "register/archaic"]
        + ["--feature", "layer-4-mask:812=2", "--schedule", '{"type": "window", "stop": 0.5}', "--layers", "2,3"]
        + ["--scope", "masked"]
    )
    sports, archaic, feature = generate.interventions(arguments)
    assert (sports.attribute, sports.strength) == ("topic/sports", -0.5)
    assert (archaic.attribute, archaic.strength) == ("register/archaic", None)
    assert feature.feature is not None
    assert (feature.feature.sae, feature.feature.index, feature.strength) == ("layer-4-mask", 812, 2.0)
    for push in (sports, archaic, feature):
        assert push.schedule == {"type": "window", "stop": 0.5}
        assert (push.layers, push.scope) == ((2, 3), "masked")


def test_steering_as_text_is_read_from_the_command_line() -> None:
    parser = build_parser()
    sports, feature = generate.interventions(
        parser.parse_args(["generate", "The", "--steer", "- topic/sports + layer-4-mask:812@2 op=clamp"])
    )
    assert (sports.attribute, sports.strength, sports.negate) == ("topic/sports", None, True)
    assert feature.feature is not None and (feature.feature.index, feature.op, feature.strength) == (812, "clamp", 2.0)
    for more, said in (
        (["--steer", "topic/sports@"], "character 14: expected a number"),
        (["--steer", "topic/sports", "--schedule", "uniform"], "leave --schedule out"),
        (["--steer", "topic/sports", "--attribute", "topic/sports"], "leave --attribute out"),
    ):
        with pytest.raises(RequestError, match=said):
            generate.interventions(parser.parse_args(["generate", "The", *more]))


def test_generate_writes_only_the_text_where_there_is_no_terminal(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "the team", "--model", str(tiny_model), "--max-tokens", "8", "--steps", "4", "--seed", "3"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--json", "--baseline"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert plain == report["text"] + "\n"
    assert report["baseline"]["tokens"] == report["tokens"]
    assert report["steps"] <= 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--attribute", "topic/sprots=1"), "unknown attribute 'topic/sprots'; known: topic/sports"),
        (("--attribute", "topic/sports", "--schedule", "comitment"), "comitment"),
        (("--verdicts", "topic/sprots"), "unknown attribute 'topic/sprots'"),
        (("--temperature", "2.5"), "temperature must be 0 to 2, got 2.5"),
    ],
)
def test_generate_refuses_before_the_weights_are_loaded(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    folder = attributes(tiny_model, tmp_path)
    monkeypatch.setattr(OpenedModel, "load", lambda *_: pytest.fail("the weights were loaded"))
    command = ["generate", "the team", "--model", str(tiny_model), "--max-tokens", "8", "--attributes", str(folder)]
    assert main([*command, *flags]) == 2
    assert said in capsys.readouterr().err


def test_generate_shows_a_baseline_with_the_order_of_what_is_pushed(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attributes(tiny_model, tmp_path)
    command = ["generate", "the team", "--model", str(tiny_model), "--max-tokens", "12", "--json"]
    command += ["--attributes", str(folder), "--order", '{"type": "sae_attribute", "weight": 0.9}']
    assert main([*command, "--attribute", "topic/sports=4", "--baseline", "--max-kl", "0.01"]) == 0
    beside = json.loads(capsys.readouterr().out)
    assert 0 < beside["receipt"]["measured_kl"] <= beside["receipt"]["limits"]["max_kl"] == 0.01
    command[-1] = '{"type": "sae_attribute", "weight": 0.9, "attribute": "topic/sports"}'
    assert main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    assert beside["baseline"]["tokens"] == alone["tokens"]
    assert beside["baseline"]["receipt"] is None


def told_as_json(flags: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_generate_refines_by_what_is_pushed_or_judged_by(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attributes(tiny_model, tmp_path)
    Probe(1, torch.linspace(-1, 1, tiny.HIDDEN), 0.1, 0.9, 8).save(tmp_path / "made")
    command = ["generate", "the team", "--model", str(tiny_model), "--max-tokens", "12", "--attributes", str(folder)]
    command += ["--temperature", "1", "--seed", "5"]
    judged = ["--verdicts", "topic/sports"]
    push, against = ["--attribute", "topic/sports=0.5"], ["--attribute", "topic/sports=-0.5"]
    for flags, sign in (
        (push, 1),
        (against, -1),
        ([*push, "--op", "project_out"], -1),
        (judged, 1),
        ([*judged, *against], -1),
    ):
        draft = told_as_json([*command, *flags, *judged], capsys)
        found = told_as_json([*command, *flags, "--refine", "6", "--baseline", "--receipt", "full"], capsys)
        told = found["receipt"]["refined"]
        for score, said in ((told["first_score"], draft), (told["score"], found)):
            odds = sign * said["verdicts"]["topic/sports"]
            assert score == pytest.approx(-math.log1p(math.exp(-odds)), abs=1e-5), flags
        assert len(told["rounds"]) == 6
        assert found["baseline"]["receipt"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            [],
            "--refine keeps what probes like better: push an attribute with --attribute, or name some with --verdicts",
        ),
        (["--feature", "layer-1-mask:3=1"], "--refine keeps what probes like better"),
        (
            ["--attribute", "topic/sports=1", "--attribute", "topic/sports=-1"],
            "--refine: 'topic/sports' is pushed both ways, so whether texts should have it is not known",
        ),
        (["--attribute", "topic/sports=1"], "attribute 'topic/sports' has no probe"),
        (["--attribute", "topic/sports=1", "--refine", "0"], "rounds must be a whole number from 1 to 256, got 0"),
    ],
)
def test_what_generate_cannot_refine_is_refused_in_its_own_words(
    flags: list[str], said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = attributes(tiny_model, tmp_path)
    command = ["generate", "the", "--model", str(tiny_model), "--max-tokens", "8", "--attributes", str(folder)]
    assert main([*command, "--refine", "2", *flags]) == 2
    assert said in capsys.readouterr().err


def test_generate_reports_what_a_request_got_wrong(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "the", "--model", str(tiny_model), "--max-tokens", "8", "--attribute", "topic/sport"]) == 2
    assert "unknown attribute 'topic/sport'" in capsys.readouterr().err


def test_inspect_shows_facts_and_tensors(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model", str(tiny_model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["num_layers"] == 2
    assert len(found["facts"]["sha256"]) == 64
    sizes = {row["name"]: row["shape"] for row in found["tensors"]}
    assert sizes["bert.embeddings.position_embeddings.weight"] == [64, 32]
    assert main(["inspect", "model", str(tiny_model)]) == 0
    assert found["facts"]["sha256"][:8] in capsys.readouterr().out


def test_inspect_tells_of_a_probe_above_the_layers_that_are_steered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.attribute(tmp_path, "topic/sports", (0,))
    command = ["inspect", "attribute", str(tmp_path), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["probe"] is None
    Probe(7, torch.ones(tiny.HIDDEN), 0.5, 0.91, 120).save(tmp_path)
    assert main(command) == 0
    probe = json.loads(capsys.readouterr().out)["facts"]["probe"]
    assert len(probe.pop("sha256")) == 64 and probe == {"layer": 7, "accuracy": 0.91, "texts": 120}


def test_a_model_trained_from_texts_alone_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "made_up.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    made = tmp_path / "made"
    data = ["--data", str(texts)]
    assert main(["train", "tokenizer", *data, "--out", str(made / "tokenizer"), "--size", "300"]) == 0
    recipe = ["--tokens", "4000", "--context", "32", "--batch-tokens", "512"]
    size = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--inner-size", "32"]
    folders = ["--tokenizer", str(made / "tokenizer"), "--out", str(made / "model")]
    assert main(["train", "dlm", *data, *folders, *recipe, *size]) == 0
    capsys.readouterr()
    assert main(["generate", "the", "--model", str(made / "model"), "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] <= 4


def test_serve_says_where_it_listens_and_stops_on_a_signal(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--model", str(tiny_model), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"}) as server:
        assert server.stderr is not None
        try:
            assert " parameters, " in server.stderr.readline()
            line = server.stderr.readline()
            found = re.match(r"ready at (http://127\.0\.0\.1:\d+)  try: (curl -s \1/v1/completions .*)", line)
            assert found, line
            assert server.stderr.readline() == f"playground at {found[1]}/playground\n"
            if shutil.which("curl"):
                told = subprocess.run(["sh", "-c", found[2]], capture_output=True, text=True, check=True).stdout
                assert json.loads(told)["choices"][0]["text"] is not None
            with urllib.request.urlopen(found[1] + "/ready", timeout=30) as answer:
                assert answer.status == 200
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) in (0, -signal.SIGTERM)
        finally:
            server.kill()


@pytest.mark.parametrize("flag", ["--model", "--sae"])
def test_a_folder_is_not_given_twice(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", flag, "one", flag, "two"])
    assert f"{flag} is given twice: one and two" in capsys.readouterr().err


def test_the_request_on_the_screen_is_steered_and_can_be_pasted(tmp_path: Path) -> None:
    for names, pushed in (({"a", "topic/sports"}, "topic/sports"), ({"it's", "zoo"}, "it's"), (set(), None)):
        first, second = ready_lines("0.0.0.0", 8123, "m o'd", names, keys=True)
        assert first.startswith("ready at http://0.0.0.0:8123  try: curl ")
        assert second == "playground at http://127.0.0.1:8123/playground"
        # What the shell makes of it.
        fake = tmp_path / "curl"
        fake.write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\0" "$one"; done\n')
        fake.chmod(0o755)
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KEY": "secret"}
        said = subprocess.run(["sh", "-c", first.partition("try: ")[2]], capture_output=True, text=True, env=path)
        arguments = said.stdout.split("\0")
        assert "http://127.0.0.1:8123/v1/completions" in arguments and "Authorization: Bearer secret" in arguments
        body = json.loads(arguments[arguments.index("-d") + 1])
        assert body["model"] == "m o'd"
        steering = {"interventions": [{"attribute": pushed}], "baseline": True}
        assert body.get("steering") == (steering if pushed is not None else None)
    assert ready_lines("::", 1, "m", (), keys=False)[1] == "playground at http://[::1]:1/playground"
