"""`steerserve label` as a whole: what it writes, that a stopped run goes on, and names by a chat model."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import steerserve.label.run as run
from steerserve.cli import main
from steerserve.errors import ArtifactError
from steerserve.label.explainer import Explainer
from steerserve.label.recipe import LabelRecipe
from steerserve.label.run import label
from steerserve.saes.feature_record import spelled_out
from steerserve.saes.feature_store import FEATURES, FeatureStore
from steerserve.saes.reading import load_sae
from tests.conftest import SENTENCES

RECIPE = LabelRecipe(
    read_tokens=1500, crop=16, levels=2, contexts=3, width=6, tokens=4, neighbours=2, samples=3, curve_samples=2,
    sample_tokens=8, sample_steps=4, slices=4, push_texts=1, batch_tokens=256,
)  # fmt: skip
FEATURES_OF_SAE = 24


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in SENTENCES[:160]]
    (folder / "short.jsonl").write_text("\n".join(lines))
    return folder


def saes(folder: Path) -> Path:
    """Two SAEs of random weights for masked and visible positions of one layer."""
    for seed, policy in enumerate(("mask", "visible")):
        place = folder / f"layer-1-{policy}"
        place.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        shapes = {"W_enc": (32, FEATURES_OF_SAE), "W_dec": (FEATURES_OF_SAE, 32), "b_enc": (FEATURES_OF_SAE,)}
        weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(weights | {"b_dec": torch.zeros(32)}, place / "sae_weights.safetensors")
        metadata = {"hook_name": "blocks.1.hook_resid_post", "policy": policy}
        config = {"architecture": "topk", "d_in": 32, "d_sae": FEATURES_OF_SAE, "k": 4, "metadata": metadata}
        (place / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    return folder


def rows(folder: Path) -> list[Any]:
    """Everything in a features.db that a query can give."""
    database = sqlite3.connect(folder / FEATURES)
    try:
        return [
            database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("meta", "features", "records", "vocabulary")
        ]
    finally:
        database.close()


class Stopped(Exception):
    """A stop that comes when the run has saved something."""


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    whole, halting = saes(tmp_path / "whole"), saes(tmp_path / "halting")
    saved: list[str] = []
    written = label(tiny_model, whole, data, RECIPE, after=saved.append)
    assert set(written) == {"layer-1-mask", "layer-1-visible"} and saved.count("activity") > 3
    stops = 0
    finished: list[dict[str, Path]] = []
    for _ in range(len(saved) + 2):
        left = 2

        def stop(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped

        try:
            finished.append(label(tiny_model, halting, data, RECIPE, after=stop))
            break
        except Stopped:
            stops += 1
    assert stops >= 3 and finished
    for name in written:
        assert rows(whole / name) == rows(halting / name)
        sae = load_sae(whole / name)
        assert sae.stats is not None
        store = FeatureStore.open(whole / name / FEATURES, FEATURES_OF_SAE, sae.facts.sha256)
        for index in store.names:
            record = store.record(index)
            assert record is not None
            told = spelled_out(record, store.meta)
            assert told["named_by"] == "contexts" and told["contexts_from"] == "data"
            assert len(told["curve"]["mean_activation"]) == 5 and len(told["promoted"]) == 4
            assert sum(one["tokens"] for one in told["histogram"]) == pytest.approx(
                float(sae.stats.density[index]) * store.meta["tokens"], rel=1e-3
            )
            assert told["contexts"][0]["activation"] == pytest.approx(float(sae.stats.max_act[index]), abs=0.01) or (
                told["contexts"][0]["activation"] < float(sae.stats.max_act[index])
            )
        store.close()
    assert not (whole / run.SCRATCH).exists()
    assert label(tiny_model, whole, data, RECIPE) == {}
    with pytest.raises(ArtifactError, match="made with another recipe"):
        label(tiny_model, whole, data, LabelRecipe())


def test_contexts_of_the_models_own_texts_hold_none_of_the_data(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    folder = saes(tmp_path / "saes")
    label(tiny_model, folder, data, LabelRecipe(**{**vars(RECIPE), "source": "samples"}))
    sae = load_sae(folder / "layer-1-mask")
    store = FeatureStore.open(folder / "layer-1-mask" / FEATURES, FEATURES_OF_SAE, sae.facts.sha256)
    texts = " ".join(SENTENCES)
    shown = [c for i in store.names for c in (store.record(i) or {})["contexts"]]
    assert shown and all("".join(one["tokens"]).strip() not in texts for one in shown if len(one["tokens"]) == 6)
    store.close()


class Chat(BaseHTTPRequestHandler):
    """A chat endpoint that calls a feature by the words it is told of."""

    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        words = body["messages"][0]["content"].rpartition(": ")[2].split(", ")[:2]
        answer = json.dumps({"choices": [{"message": {"content": f'"{" and ".join(words)}"\n'}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def chat() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_names_by_a_chat_model(tiny_model: Path, data: Path, tmp_path: Path, chat: str) -> None:
    folder = saes(tmp_path / "saes")
    label(tiny_model, folder, data, RECIPE, layers=[1], explainer=Explainer(chat, "some-model"))
    sae = load_sae(folder / "layer-1-mask")
    store = FeatureStore.open(folder / "layer-1-mask" / FEATURES, FEATURES_OF_SAE, sae.facts.sha256)
    assert store.meta["named_by"] == "explainer some-model" and store.names
    index = min(store.names)
    record = store.record(index)
    assert record is not None and record["named_by"] == "some-model"
    assert store.names[index] == " and ".join(record["words"][:2])
    question = Chat.asked[0]["messages"][0]["content"]
    assert "<<" in question and Chat.asked[0]["model"] == "some-model"
    store.close()
    with pytest.raises(ArtifactError, match="--explainer http://127.0.0.1:9/v1"):
        Explainer("http://127.0.0.1:9/v1", "m").name([], ["a"])


def test_the_command_says_what_is_wrong(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saes(tmp_path / "saes")
    assert main(["label", "--sae", str(folder), "--data", str(data), "--explainer", "http://x/v1"]) == 2
    assert "--explainer and --explainer-model need each other" in capsys.readouterr().err
    assert main(["label", "--sae", str(folder), "--data", str(data), "--levels", "0"]) == 2
    assert "levels must be 1 or more" in capsys.readouterr().err
    assert main(["label", "--sae", str(folder), "--data", str(data)]) == 2
    assert "hidden size 32, but the model's is" in capsys.readouterr().err
