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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b", "label": 1\n', "line 2: not a JSON object"),
        (b'{"text": "a"}\n["b"]\n', "line 2: .*JSON object.*got list"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b'{"text": 7}\n', "line 1: `text` must be a string, got int"),
        (b'{"text": "caf\xe9"}\n', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    cut = gzip.compress(b'{"text": "a"}\n' * 9)[:-9]
    file = tmp_path / ("texts.jsonl.gz" if content is None else "texts.jsonl")
    file.write_bytes(cut if content is None else content)
    with pytest.raises(ArtifactError, match=f"texts.jsonl.*{message}"):
        list(corpus.rows(file))


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n \n')
    assert [row["text"] for row in corpus.rows(tmp_path / "texts.jsonl")] == ["a", "b"]


def test_no_file_silently_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "texts.jsonl.bak").write_text("old")
    assert corpus.files(tmp_path) == {"texts": tmp_path / "texts.jsonl"}
    (tmp_path / "deep" / "texts.v2.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ArtifactError, match=r"texts\.jsonl.*have one name, 'texts'"):
        corpus.files(tmp_path)


def test_tokenised_sentences_get_their_spacing_back(tmp_path: Path) -> None:
    path = tmp_path / "sst2_train.jsonl"
    path.write_text(json.dumps({"text": "it 's a film , and -lrb- almost -rrb- ca n't miss ."}) + "\n")
    assert [row["text"] for row in corpus.rows(path)] == ["it's a film, and (almost) can't miss."]
