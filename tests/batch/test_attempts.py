"""What an answer means for its request."""

import email.utils
import time

import httpx2
import pytest

from steerserve.batch.attempts import (
    Answered,
    Broken,
    Outcome,
    RefusedKeyError,
    TurnedAway,
    Unreached,
    judged,
    retry_after,
)

ERROR = b'{"error": {"message": "no", "type": "t", "param": null, "code": "c"}}'


def judge(status: int, content: bytes = ERROR, **headers: str) -> Outcome:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx2.Request("POST", "http://host:1/v1/completions")
    return judged(httpx2.Response(status, headers=named, content=content, request=request), "mine")


@pytest.mark.parametrize("status", [200, 400, 403, 404, 410, 413, 422, 501])
def test_an_answer_that_another_attempt_would_not_better_is_the_requests(status: int) -> None:
    told = judge(status, x_request_id="theirs")
    assert isinstance(told, Answered) and told.error is None and told.response is not None
    assert (told.response["status_code"], told.response["request_id"]) == (status, "theirs")
    assert told.response["body"]["error"]["code"] == "c"


@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_a_failure_may_be_tried_again_unless_the_server_says_that_it_would_end_alike(status: int) -> None:
    told = judge(status)
    assert isinstance(told, Broken) and not told.lost
    assert told.last.response is not None and told.last.response["request_id"] == "mine"
    assert isinstance(judge(status, x_should_retry="false"), Answered)


def test_a_revision_that_one_server_does_not_have_may_be_anothers() -> None:
    told = judge(404, ERROR.replace(b'"c"', b'"revision_not_served"'))
    assert isinstance(told, Broken) and told.last.response is not None and told.last.response["status_code"] == 404


def test_a_server_that_turns_a_request_away_says_for_how_long() -> None:
    for status in (429, 503):
        assert judge(status, retry_after="7") == TurnedAway(7.0)
        assert judge(status, retry_after="7", retry_after_ms="250") == TurnedAway(0.25)
    assert judge(429) == TurnedAway(1.0)


def test_a_proxy_without_a_server_is_no_server() -> None:
    told = judge(503, b"<html>503 Service Unavailable</html>")
    assert isinstance(told, Unreached) and "503 Service" in told.why


def test_what_is_no_json_is_told_so() -> None:
    page = b"<html>" + 10_000 * b"x"
    told = judge(404, page)
    assert isinstance(told, Answered) and told.error is not None and told.response is not None
    assert told.error["code"] == "not_json" and len(told.error["message"]) < 600
    assert told.response["status_code"] == 404 and told.response["body"] is None
    assert isinstance(judge(200, page), Broken) and isinstance(judge(200, b"[1]"), Broken)


def test_an_unknown_key_ends_everything() -> None:
    with pytest.raises(RefusedKeyError, match="http://host:1/ refuses the key: no"):
        judge(401)


def test_retry_after_is_read_in_each_of_its_forms() -> None:
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "-1"}) == 0.0
    assert retry_after({"retry-after-ms": "x", "retry-after": "3"}) == 3.0
    assert retry_after({"retry-after": email.utils.formatdate(0, usegmt=True)}) == 0.0
    later = retry_after({"retry-after": email.utils.formatdate(time.time() + 1000, usegmt=True)})
    assert later is not None and 900 < later <= 1000
