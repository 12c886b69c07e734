import json
from typing import Any

import pytest

from steerserve.engine.api.params import FeatureRef, Intervention, TraceParams, VectorRef
from steerserve.errors import NotFoundError, RequestError
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import parse
from steerserve.server.rows.rows import Row, admit, rows_of
from tests.server.text_engine import TextEngine


def body_of(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "text"} | fields).encode(), CompletionRequest)


def rows(**fields: Any) -> list[Row]:
    return rows_of(body_of(**fields), seed=7, max_rows=64)


def test_one_row_a_prompt_and_sample_with_running_numbers() -> None:
    made = rows(prompt=["a", "b"], n=3)
    assert [(row.params.prompt, row.params.row, row.choice, row.prompt) for row in made] == [
        (prompt, index, index, index // 3) for index, prompt in enumerate("aaabbb")
    ]
    assert {row.params.seed for row in made} == {7}


def test_every_row_has_the_priority_of_its_request() -> None:
    assert {row.params.priority for row in rows(prompt=["a", "b"], priority=-3, steering={"baseline": True})} == {-3}
    assert {row.params.priority for row in rows(prompt="a")} == {0}


def test_approximations_are_asked_for_in_diffusion() -> None:
    [row] = rows(diffusion={"cache": {"type": "dual", "refresh_every": 4}, "early_exit": True})
    assert (row.params.cache, row.params.early_exit) == ({"type": "dual", "refresh_every": 4}, True)
    [row] = rows(diffusion={"cache": None})
    assert (row.params.cache, row.params.early_exit) == (None, False)


def test_twin_shares_seed_and_row_and_has_no_steering() -> None:
    made = rows(
        n=2,
        steering={"interventions": [{"attribute": "a"}], "baseline": True, "trace": {"attributes": ["a"]}},
    )
    assert [(row.choice, row.baseline) for row in made] == [(0, False), (0, True), (1, False), (1, True)]
    for steered, twin in zip(made[::2], made[1::2], strict=True):
        assert (steered.params.seed, steered.params.row) == (twin.params.seed, twin.params.row)
        assert steered.params.interventions
        assert not twin.params.interventions
        assert twin.params.trace is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, [""]),
        ("a", ["a"]),
        ([1, 2], [(1, 2)]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_every_form_of_prompt(prompt: Any, expected: list[Any]) -> None:
    assert [row.params.prompt for row in rows(prompt=prompt)] == expected


def test_every_field_reaches_the_engine() -> None:
    order, transfer = {"type": "random"}, {"type": "threshold", "value": 0.9}
    [row] = rows(
        suffix="end",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop="x",
        logprobs=0,
        diffusion={"steps": 3, "block_length": 4, "order": order, "transfer": transfer},
        steering={
            "interventions": [
                {"attribute": "a", "strength": 0, "layers": [1, 2], "direction": "diff_means", "schedule": "uniform"},
                {"feature": {"sae": "s", "index": 3}, "op": "clamp", "unit": "max_act", "scope": "masked"},
                {"vector": {"layer": 4, "values": [1, 2.5]}, "scope": {"positions": [2, 5]}},
            ],
            "trace": {"attributes": ["a"], "every": 4},
        },
    )
    params = row.params
    assert (params.suffix, params.max_tokens, params.temperature, params.top_p) == ("end", 9, 0.5, 0.9)
    assert (params.stop, params.logprobs) == (("x",), True)
    assert (params.steps, params.block_length, params.order, params.transfer) == (3, 4, order, transfer)
    assert params.trace == TraceParams(("a",), 4)
    assert params.interventions == (
        Intervention(attribute="a", strength=0, layers=(1, 2), direction="diff_means", schedule="uniform"),
        Intervention(feature=FeatureRef("s", 3), op="clamp", unit="max_act", scope="masked"),
        Intervention(vector=VectorRef(4, (1, 2.5)), scope=(2, 5)),
    )


def test_fields_of_other_servers_reach_the_engine() -> None:
    [row] = rows(max_completion_tokens=9, ignore_eos=True, logprobs=3)
    params = row.params
    assert (params.max_tokens, params.ignore_eos, params.logprobs, params.top_logprobs) == (9, True, True, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 65}, "n"),
        ({"n": 33, "steering": {"baseline": True}}, "n"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"best_of": 65}, "best_of"),
        ({"prompt": ["a", "b"], "n": 2, "best_of": 17, "steering": {"baseline": True}}, "best_of"),
    ],
)
def test_too_many_rows_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="a request may have 64") as caught:
        rows(**fields)
    assert caught.value.param == param


class Complaining(TextEngine):
    def __init__(self, error: RequestError) -> None:
        super().__init__()
        self.error = error

    def admit(self, params: Any) -> Any:
        if params.row == 1:
            raise self.error
        return super().admit(params)


@pytest.mark.parametrize(
    ("engine_says", "request_says"),
    [
        ("interventions[0].schedule", "steering.interventions[0].schedule"),
        ("interventions", "steering.interventions"),
        ("trace.attributes[1]", "steering.trace.attributes[1]"),
        ("order", "diffusion.order"),
        ("transfer.value", "diffusion.transfer.value"),
        ("steps", "diffusion.steps"),
        ("block_length", "diffusion.block_length"),
        ("cache", "diffusion.cache"),
        ("early_exit", "diffusion.early_exit"),
        ("prompt", "prompt[1]"),
        ("prompt[4]", "prompt[1][4]"),
        ("max_tokens", "max_tokens"),
        ("top_p", "top_p"),
        (None, None),
    ],
)
def test_an_engines_complaint_gets_the_requests_path(engine_says: str | None, request_says: str | None) -> None:
    body = body_of(prompt=["a", "b"])
    engine = Complaining(NotFoundError("no such thing", engine_says))
    with pytest.raises(NotFoundError, match="no such thing") as caught:
        admit(engine.admit, rows_of(body, 7, 64), body)
    assert caught.value.param == request_says


def test_a_complaint_about_the_length_names_the_field_that_was_sent() -> None:
    body = body_of(prompt=["a", "b"], max_completion_tokens=5)
    with pytest.raises(RequestError) as caught:
        admit(Complaining(RequestError("too long", "max_tokens")).admit, rows_of(body, 7, 64), body)
    assert caught.value.param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("engine_says", "steering", "request_says"),
    [
        ("verdicts", {"rank": ["a", "b"]}, "steering.rank"),
        ("verdicts[1]", {"rank": ["a", "-b"]}, "steering.rank[1]"),
        ("verdicts", {"interventions": [{"attribute": "topic/sports"}]}, "best_of"),
        (
            "verdicts[0]",
            {"interventions": [{"vector": {"name": "v"}}, {"attribute": "topic/sports"}]},
            "steering.interventions[1].attribute",
        ),
    ],
)
def test_what_cannot_be_judged_is_laid_on_what_asked_for_it(
    engine_says: str, steering: dict[str, Any], request_says: str
) -> None:
    body = body_of(best_of=2, steering=steering)
    with pytest.raises(RequestError, match="no probe") as caught:
        admit(Complaining(RequestError("no probe", engine_says)).admit, rows_of(body, 7, 64)[1:], body)
    assert caught.value.param == request_says
    assert ("unless steering.rank names others" in str(caught.value)) == ("rank" not in steering)
