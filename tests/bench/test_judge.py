"""The judge of quality: it learns, resumes, and says the same of a text in any company."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import judge as command
from bench.judges.model import JudgeConfig, LanguageModel
from bench.judges.scoring import QualityJudge, load_judge
from bench.judges.texts import START, is_judges, judges_texts, plain
from bench.judges.training import JudgeRecipe, rate, train
from steerserve.errors import ArtifactError
from steerserve.train import corpus
from tests.bench.made import make_texts

CONFIG = JudgeConfig(vocabulary=320, width=32, layers=2, heads=2, context=48)
RECIPE = JudgeRecipe(tokens=40 * 4 * 48, rows=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("judge") / "data")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, CONFIG, RECIPE)
    return folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> QualityJudge:
    return load_judge(folder)


def test_its_texts_are_of_the_bench_split_and_not_the_classifiers(data: Path) -> None:
    known = {plain(row["text"]): row["text"] for row in corpus.rows(data / "who.jsonl")}
    seen, held_out = judges_texts(data, False)["who"], judges_texts(data, True)["who"]
    assert all(corpus.split_of(known[text]) == "bench" and is_judges(known[text]) for text in [*seen, *held_out])
    assert not set(seen) & set(held_out)
    assert 0.3 < len([*seen, *held_out]) / sum(corpus.split_of(text) == "bench" for text in known.values()) < 0.5


def test_it_prefers_what_it_was_trained_on(judge: QualityJudge) -> None:
    likely, unlikely = judge.judge(
        ["the king won the match 5, and it rained.", "match rained king the and 5 won it the"]
    )
    assert likely.nats / likely.bytes < unlikely.nats / unlikely.bytes


def test_a_verdict_does_not_depend_on_the_other_texts(judge: QualityJudge) -> None:
    texts = ["the king won", "the crew lost the ship 12, and nobody knew why.", "", "x"]
    alone = [judge.judge([text])[0] for text in texts]
    for one, other in zip(alone, judge.judge(texts), strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-5)
        assert one.bytes == other.bytes
    assert (alone[2].nats, alone[2].bytes) == (0.0, 1)
    assert alone[0] == judge.judge(["  The KING   won "])[0]


def test_a_verdict_is_the_sum_of_plain_log_probabilities(judge: QualityJudge) -> None:
    text = "the team won the city 3"
    ids = [judge.tokenizer.token_to_id(START), *judge.tokenizer.encode(text).ids]
    total = 0.0
    for end in range(1, len(ids)):
        hidden = judge.model(torch.tensor([ids[:end]]))[0, -1]
        total -= float((hidden @ judge.model.embedding.weight.T).log_softmax(0)[ids[end]])
    assert judge.judge([text])[0].nats == pytest.approx(total, rel=1e-4)
    assert judge.judge([text])[0].bytes == len(text)


def test_of_a_long_text_the_bytes_that_were_read_count(judge: QualityJudge) -> None:
    long = " ".join(["the king won"] * 60)
    assert judge.judge([long])[0].bytes < len(long) / 2


def test_no_token_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    tokens = torch.randint(0, 320, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = 7
    assert torch.allclose(model(tokens)[:, :8], model(changed)[:, :8], atol=1e-5)


def test_a_stopped_training_goes_on_to_the_same_weights(data: Path, folder: Path, tmp_path: Path) -> None:
    import bench.judges.training as training

    class Stopped(Exception):
        pass

    def stop(share: float) -> float:
        if share > 0.6:
            raise Stopped
        return rate(RECIPE, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", -1.0)
        patch.setattr(training, "HELD_OUT_BATCHES", 1)
        patch.setattr(training, "rate", lambda _, share: stop(share))
        with pytest.raises(Stopped):
            train(data, tmp_path, CONFIG, RECIPE)
    train(data, tmp_path, CONFIG, RECIPE)
    whole, parts = (load_judge(one).model.state_dict() for one in (folder, tmp_path))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-4), name


def test_another_recipe_does_not_go_on_from_it(data: Path, folder: Path) -> None:
    with pytest.raises(ArtifactError, match="choose another folder"):
        train(data, folder, CONFIG, replace(RECIPE, seed=5))


def test_the_command_says_in_words_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steerserve.memory.keep_freed_memory", lambda: False)
        assert command.main(["--data", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert "no .jsonl" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="bench/judge.py"):
        load_judge(tmp_path)
