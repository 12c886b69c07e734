"""Batch files as they are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from steerserve.batch.requests import read_requests
from steerserve.errors import ArtifactError


def line(name: str = "a", **other: Any) -> str:
    body = {"model": "text", "prompt": "the"}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} | other)


def written(folder: Path, *lines: str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_requests_come_in_the_order_of_their_lines(tmp_path: Path) -> None:
    chat = line("b", url="/v1/chat/completions", body={"model": "text", "messages": []})
    found = read_requests(written(tmp_path, line("c"), "", chat, "  ", line("a"), ""))
    assert [one.custom_id for one in found] == ["c", "b", "a"]
    assert found[1].url == "/v1/chat/completions" and found[1].body == {"model": "text", "messages": []}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "the line: "),
        (line(custom_id=""), "custom_id: "),
        (line(custom_id=7), "custom_id: "),
        (line(method="GET"), "method: "),
        (line(url="/v1/embeddings"), "url: "),
        (line(body="the"), "body: "),
        (line(body={"stream": True}), "body.stream: "),
        (line(priority=1), "priority: "),
        (json.dumps({"custom_id": "b"}), "method: "),
        (line("first"), "custom_id 'first' is that of line 1 too"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, line("first"), "", wrong)
    with pytest.raises(ArtifactError) as raised:
        read_requests(path)
    assert str(raised.value).startswith(f"{path}:3: ") and said in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no request"):
        read_requests(written(tmp_path, "", ""))
    with pytest.raises(ArtifactError, match="No such file"):
        read_requests(tmp_path / "nowhere.jsonl")
