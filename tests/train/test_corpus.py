"""Reading texts: splits by hash, both file kinds, tokenised sets put back into ordinary spacing."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from steerserve.errors import ArtifactError
from steerserve.train import corpus


def test_splits_are_fixed_by_the_text_and_have_the_stated_shares() -> None:
    counts = Counter(corpus.split_of(f"text number {i}") for i in range(20_000))
    assert corpus.split_of("text number 1") == corpus.split_of("text number 1")
    assert abs(counts["valid"] / 20_000 - 0.04) < 0.005
    assert abs(counts["bench"] / 20_000 - 0.40) < 0.015


def test_plain_and_gzipped_files_are_found_in_any_depth_and_dev_sets_are_not(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with gzip.open(tmp_path / "deep" / "two.jsonl.gz", "wt") as out:
        out.write('{"text": "b", "label": 1}\n')
    (tmp_path / "one_dev.jsonl").write_text('{"text": "c"}\n')
    found = corpus.files(tmp_path)
    assert list(found) == ["two", "one"] or list(found) == ["one", "two"]
    assert [row["text"] for stem in ("one", "two") for row in corpus.rows(found[stem])] == ["a", "b"]


def test_an_empty_directory_and_a_row_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no \.jsonl"):
        corpus.files(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ArtifactError, match="'body'"):
        list(corpus.rows(tmp_path / "bad.jsonl"))


def test_tokenised_sentences_get_their_spacing_back(tmp_path: Path) -> None:
    path = tmp_path / "sst2_train.jsonl"
    path.write_text(json.dumps({"text": "it 's a film , and -lrb- almost -rrb- ca n't miss ."}) + "\n")
    assert [row["text"] for row in corpus.rows(path)] == ["it's a film, and (almost) can't miss."]
