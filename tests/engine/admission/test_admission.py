"""Admission: what cannot be honoured is refused, naming the field; what is admitted is resolved and runs."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, TraceParams, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import NotFoundError, RequestError
from steerserve.models import SamplerDefaults
from tests import tiny

VALUES = tuple(float(i + 1) for i in range(tiny.HIDDEN))
VECTOR = Intervention(vector=VectorRef(1, VALUES), strength=1.0)
FEATURE = Intervention(feature=FeatureRef("layer-1-mask", 3), strength=0.5)
ATTRIBUTE = Intervention(attribute="topic/sports")
PLAIN = GenerationParams(prompt="the king", max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path_factory.mktemp("catalogue"), max_steps=100, max_interventions=3)


def refused(served: DiffusionEngine, params: GenerationParams) -> RequestError:
    with pytest.raises(RequestError) as error:
        served.admit(params)
    return error.value


BAD_PARAMS: list[tuple[str, Any]] = [
    ("prompt", (tiny.VOCAB,)),
    ("prompt", (-1,)),
    ("prompt", (True,)),
    ("prompt", (5.0,)),
    ("prompt", (tiny.MASK,)),
    ("prompt", "the [MASK] king"),
    ("suffix", (tiny.VOCAB + 9,)),
    ("suffix", (5, tiny.MASK)),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", tiny.CONTEXT + 1),
    ("max_tokens", 2.5),
    ("max_tokens", True),
    ("steps", 0),
    ("steps", -1),
    ("steps", 101),
    ("steps", 1.5),
    ("block_length", 0),
    ("block_length", 13),
    ("block_length", 5),
    ("order", "best"),
    ("order", ""),
    ("order", {}),
    ("order", {"type": "confidence", "x": 1}),
    ("order", {"type": "sae_stability", "weight": 2}),
    ("order", {"type": "sae_stability", "sae": "none such"}),
    ("transfer", "fast"),
    ("transfer", ""),
    ("transfer", {"type": "threshold", "value": 0}),
    ("transfer", {"type": "threshold", "value": math.nan}),
    ("transfer", {"type": "entropy_bound", "value": -1}),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 0.5),
    ("stop", ("a", "")),
    ("stop", tuple("abcdefghijklmnopq")),
    ("interventions", (ATTRIBUTE,) * 4),
]


@pytest.mark.parametrize(("field", "value"), BAD_PARAMS, ids=lambda one: repr(one)[:40])
def test_a_bad_value_is_refused_by_name(served: DiffusionEngine, field: str, value: Any) -> None:
    changes: dict[str, Any] = {field: value}
    error = refused(served, replace(PLAIN, **changes))
    assert error.param == field
    if field not in ("interventions", "prompt", "suffix", "order", "transfer"):
        assert repr(value).strip("(),") in str(error) or str(value) in str(error)


def test_unknown_names_are_not_found_and_the_known_ones_listed(served: DiffusionEngine) -> None:
    for params, known in (
        (replace(PLAIN, interventions=(Intervention(attribute="x"),)), "topic/sports, register/archaic"),
        (replace(PLAIN, interventions=(replace(FEATURE, feature=FeatureRef("x", 1)),)), "layer-1-mask"),
        (replace(PLAIN, trace=TraceParams(("x",))), "topic/sports"),
    ):
        error = refused(served, params)
        assert isinstance(error, NotFoundError)
        assert known in str(error)


def test_a_trace_is_checked(served: DiffusionEngine) -> None:
    assert refused(served, replace(PLAIN, trace=TraceParams(("topic/sports",), every=0))).param == "trace.every"
    assert refused(served, replace(PLAIN, trace=TraceParams(("topic/sports", "x")))).param == "trace.attributes[1]"


def test_a_canvas_that_is_too_long_is_refused_with_its_parts(served: DiffusionEngine) -> None:
    prompt = (5,) * 80
    error = refused(served, replace(PLAIN, prompt=prompt, suffix=(6,) * 4))
    assert error.param == "max_tokens"
    # BOS stands before the prompt.
    assert "prompt (81 tokens), max_tokens (12) and suffix (4)" in str(error)
    assert "97 tokens; at most 96" in str(error)
    request = served.admit(replace(PLAIN, prompt=prompt, suffix=(6,) * 3))
    assert len(request.canvas) == tiny.CONTEXT


def test_steps_are_shared_by_the_blocks(served: DiffusionEngine) -> None:
    error = refused(served, replace(PLAIN, block_length=4, steps=7))
    assert error.param == "steps"
    assert "3 blocks" in str(error)
    assert served.admit(replace(PLAIN, block_length=4, steps=9)).block_steps == 3


def test_an_order_that_needs_an_sae_needs_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = tiny.engine(tiny.bert(), tmp_path_factory.mktemp("bare"))
    bare.catalogue = replace(bare.catalogue, saes={"v": tiny.sae(2, policy="visible", name="v")})
    assert refused(bare, replace(PLAIN, order="sae_stability")).param == "order"
    chosen = bare.admit(replace(PLAIN, order={"type": "sae_stability", "sae": "v"})).stability
    assert chosen is bare.catalogue.saes["v"]


def test_the_deepest_sae_for_masked_positions_is_the_one_compared(served: DiffusionEngine) -> None:
    chosen = served.admit(replace(PLAIN, order="sae_stability")).stability
    assert chosen is served.catalogue.saes["layer-2-mask"]


def test_the_plan_says_what_the_canvas_is(served: DiffusionEngine) -> None:
    request = served.admit(replace(PLAIN, suffix="ship", steps=4, order={"type": "margin"}))
    assert request.prompt_ids[0] == tiny.CLS
    assert request.plan["canvas"] == {"prompt": 3, "response": 12, "suffix": 1}
    assert (request.plan["steps"], request.plan["block_length"]) == (4, 12)
    assert request.plan["order"] == {"type": "margin"}
    assert request.plan["transfer"] == "linear"


def test_every_request_has_an_id_of_its_own(served: DiffusionEngine) -> None:
    assert len({served.admit(PLAIN).id for _ in range(50)}) == 50


NUMBERS = st.one_of(st.floats(), st.integers(-(10**6), 10**6))
WHOLE = st.integers(-5, 130)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(st.text(max_size=20), st.lists(WHOLE, max_size=100).map(tuple)),
    "suffix": st.one_of(st.text(max_size=20), st.lists(WHOLE, max_size=100).map(tuple)),
    "max_tokens": st.one_of(WHOLE, NUMBERS),
    "steps": st.one_of(st.none(), WHOLE, NUMBERS),
    "block_length": st.one_of(st.none(), WHOLE, NUMBERS),
    "order": st.one_of(st.none(), st.text(max_size=8), st.dictionaries(st.text(max_size=4), NUMBERS, max_size=2)),
    "transfer": st.one_of(
        st.none(), st.text(max_size=8), st.builds(lambda v: {"type": "threshold", "value": v}, NUMBERS)
    ),
    "temperature": st.one_of(st.none(), NUMBERS),
    "top_p": st.one_of(st.none(), NUMBERS),
    "seed": st.integers(-(2**70), 2**70),
    "stop": st.lists(st.text(max_size=3), max_size=20).map(tuple),
    "trace": st.builds(TraceParams, st.lists(st.sampled_from(["topic/sports", "x"]), max_size=2).map(tuple), WHOLE),
}
OPS: Any = st.sampled_from(["add", "boost", "multiply", "clamp", "project_out", "cap"])
PUSHES = st.builds(
    Intervention,
    attribute=st.sampled_from([None, None, "topic/sports", "register/archaic", "x"]),
    feature=st.one_of(st.none(), st.builds(FeatureRef, st.sampled_from(["layer-1-mask", "x"]), st.integers(-2, 60))),
    vector=st.one_of(
        st.none(),
        st.builds(VectorRef, st.integers(-2, 5), st.lists(st.floats(), min_size=32, max_size=32).map(tuple)),
    ),
    strength=st.one_of(st.none(), st.floats()),
    op=OPS,
    unit=st.sampled_from([None, None, "residual", "max_act", "raw", "kl"]),
    scope=st.one_of(st.sampled_from([None, "all", "masked"]), st.tuples(WHOLE, WHOLE)),
    schedule=st.one_of(
        st.sampled_from([None, "uniform", "commitment", "x"]),
        st.builds(lambda a, b: {"type": "window", "start": a, "stop": b}, st.floats(), st.floats()),
    ),
    layers=st.one_of(st.none(), st.lists(st.integers(-2, 4), max_size=3).map(tuple)),
)


@settings(max_examples=300)
@given(changes=st.fixed_dictionaries({}, optional=FIELDS), pushes=st.lists(PUSHES, max_size=4))
def test_anything_is_either_admitted_or_refused_by_field(
    served: DiffusionEngine, changes: dict[str, Any], pushes: list[Intervention]
) -> None:
    params = replace(PLAIN, interventions=tuple(pushes), **changes)
    try:
        request = served.admit(params)
    except RequestError as error:
        assert error.param is not None
        assert error.param.split("[")[0].split(".")[0] in (*FIELDS, "interventions")
        return
    assert len(request.canvas) <= tiny.CONTEXT
    assert all(math.isfinite(push.strength) and bool(push.gains.isfinite().all()) for push in request.pushes)
    assert bool(all(push.direction.isfinite().all() for push in request.pushes))


@settings(max_examples=40)
@given(push=PUSHES, change=st.sampled_from([replace(ATTRIBUTE), replace(FEATURE), replace(VECTOR)]))
def test_what_is_admitted_runs(served: DiffusionEngine, push: Intervention, change: Intervention) -> None:
    mixed = replace(change, strength=push.strength, op=push.op, scope=push.scope, schedule=push.schedule)
    try:
        request = served.admit(replace(PLAIN, steps=3, interventions=(mixed,)))
    except RequestError:
        return
    served.add([request])
    assert len(tiny.results(tiny.drain(served))) == 1


def plain_text(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    return str(error.value)


def test_messages_say_the_value_and_what_is_allowed(served: DiffusionEngine) -> None:
    assert plain_text(lambda: served.admit(replace(PLAIN, steps=101))) == (
        "steps must be a whole number from 1 to 100, got 101"
    )
    text = plain_text(
        lambda: served.admit(replace(PLAIN, interventions=(replace(VECTOR, vector=VectorRef(9, VALUES)),)))
    )
    assert text == "layer must be 0 to 2, got 9"


def test_what_a_request_leaves_out_is_the_models_default(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = tiny.engine(tiny.bert(), tmp_path_factory.mktemp("defaults"))
    made.catalogue = replace(made.catalogue, defaults=SamplerDefaults(0.3, 0.8, "entropy", "cosine", True))
    request = made.admit(GenerationParams(max_tokens=4))
    assert (request.params.temperature, request.params.top_p, request.params.ignore_eos) == (0.3, 0.8, True)
    assert (request.plan["order"], request.plan["transfer"]) == ("entropy", "cosine")
    own = GenerationParams(
        max_tokens=4, temperature=0.0, top_p=1.0, order="random", transfer="linear", ignore_eos=False
    )
    request = made.admit(own)
    assert request.params == own
    assert (request.plan["order"], request.plan["transfer"]) == ("random", "linear")


@pytest.mark.parametrize(
    ("change", "draws"),
    [
        ({}, False),
        ({"order": "margin", "transfer": "cosine"}, False),
        ({"order": {"type": "entropy", "filtered": True}, "transfer": "timesteps"}, False),
        ({"order": "sae_stability", "transfer": {"type": "threshold", "value": 0.5}}, False),
        ({"order": {"type": "sae_attribute", "attribute": "topic/sports"}, "transfer": "entropy_bound"}, False),
        ({"temperature": 1.0, "top_k": 1}, False),
        ({"temperature": 1.0}, True),
        ({"order": "random"}, True),
        ({"order": {"type": "confidence", "alg_temp": 2.0}}, True),
        ({"transfer": "origin"}, True),
        ({"transfer": "ddpm"}, True),
        ({"transfer": {"type": "remdm", "eta": 0.3}, "temperature": 1.0, "top_k": 1}, True),
    ],
    ids=str,
)
def test_rows_of_other_noise_are_alike_where_nothing_is_drawn(
    served: DiffusionEngine, change: dict[str, Any], draws: bool
) -> None:
    cold = GenerationParams(max_tokens=12, steps=6, temperature=0.0, order="confidence", transfer="linear")
    rows = [replace(cold, row=row, ignore_eos=True, **change) for row in range(8)]
    found = tiny.run(served, *rows)
    assert {request.draws for request, _ in found} == {draws}
    assert (len({result.tokens for _, result in found}) > 1) is draws


@pytest.mark.parametrize("transfer", ["analytic", "euler"])
def test_transfers_by_ratios_draw_at_temperature_0_too(tmp_path: Path, transfer: str) -> None:
    served = tiny.engine(tiny.sedd(), tmp_path)
    cold = GenerationParams(max_tokens=12, steps=6, temperature=0.0, order="random", transfer=transfer)
    assert served.admit(cold).draws
