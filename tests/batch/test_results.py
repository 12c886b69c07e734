"""The file of results: whole lines, one a request, whatever ended the last run."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerserve.batch.results import BatchResult, ResultFile
from steerserve.errors import ArtifactError

NAMES = [f"request {number} é" for number in range(5)]


def result(name: str, status: int = 200) -> BatchResult:
    body = {"text": "naïve\u2028\n", "n": 1}
    return BatchResult("batch_req_1", name, {"status_code": status, "request_id": "r", "body": body})


def names_in(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().split("\n")[:-1]]


@given(cut=st.integers(0, 2000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off_anywhere_is_gone_on_with(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.unlink(missing_ok=True)
    with ResultFile(path, NAMES) as file:
        for name in NAMES:
            file.write(result(name))
    whole = path.read_bytes()
    os.truncate(path, min(cut, len(whole)))
    with ResultFile(path, NAMES) as file:
        assert list(file.results) == NAMES[: whole[:cut].count(b"\n")]
        for name in NAMES:
            if name not in file.results:
                file.write(result(name))
    assert path.read_bytes() == whole


def test_a_file_is_written_by_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path, NAMES), pytest.raises(ArtifactError, match="another run"):
        ResultFile(path, NAMES)
    with ResultFile(path, NAMES) as file:
        assert not file.results


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a letter\n", "not a line of results"),
        ("a letter", "not a line of results"),
        ("[]\n", "not a line of results"),
        (result("another").line().decode(), "not in this batch"),
        (2 * result(NAMES[0]).line().decode(), "has a line already"),
    ],
)
def test_a_file_that_is_no_result_of_this_batch_is_left_alone(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=said):
        ResultFile(path, NAMES)
    assert path.read_text() == content


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        ResultFile(tmp_path / "pipe", NAMES)


def test_lines_of_requests_that_were_not_served_are_dropped_where_that_is_asked(tmp_path: Path) -> None:
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    lost = BatchResult("batch_req_2", NAMES[2], None, {"code": "connection_lost", "message": "gone"})
    with ResultFile(path, NAMES) as file:
        for one in (result(NAMES[0]), result(NAMES[1], 500), lost, result(NAMES[3])):
            file.write(one)
    with ResultFile(link, NAMES) as file:
        assert len(file.results) == 4
    with ResultFile(link, NAMES, retry_failed=True) as file:
        assert list(file.results) == [NAMES[0], NAMES[3]]
        with pytest.raises(ArtifactError, match="another run"):
            ResultFile(path, NAMES)
        file.write(result(NAMES[1]))
    assert link.is_symlink() and names_in(path) == [NAMES[0], NAMES[3], NAMES[1]]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]
