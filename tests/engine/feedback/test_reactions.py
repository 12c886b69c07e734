"""What rows do about what they read: push while it holds, end, have tokens written anew."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.admission.conditions import gauge
from steerserve.engine.api.conditions import Quantity
from steerserve.engine.api.events import Committed, Done, Event, Revised
from steerserve.engine.api.params import GenerationParams, Intervention, TraceParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.meter import ReadoutBatch
from steerserve.engine.request.readouts import Readout
from steerserve.engine.request.request import Request
from steerserve.errors import NotFoundError, RequestError
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.saes import SaeFacts, SparseAutoencoder
from steerserve.saes.activation import Activation, JumpRelu, Relu
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=16, steps=8, seed=3, transfer="linear", ignore_eos=True)
PUSH = Intervention(attribute="topic/sports", strength=20.0, schedule="uniform")
ALWAYS = {"progress": {"at_least": 0.0}}
NEVER = {"progress": {"above": 1.0}}


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def solo(served: DiffusionEngine, params: GenerationParams) -> tuple[Request, list[Event], Done]:
    request, events = tiny.solo(served, params)
    assert isinstance(events[-1], Done)
    return request, events, events[-1]


def rebuilt(events: Sequence[Event], request: Request) -> list[int]:
    """The response as committed and revised events build it."""
    tokens = [tiny.MASK] * request.params.max_tokens
    for event in events:
        if isinstance(event, Committed) and event.request_id == request.id:
            for position, token in zip(event.positions, event.tokens, strict=True):
                assert tokens[position] == tiny.MASK, "committed twice"
                tokens[position] = token
        if isinstance(event, Revised) and event.request_id == request.id:
            for position in event.positions:
                assert tokens[position] != tiny.MASK, "revised without a token"
                tokens[position] = tiny.MASK
    return tokens


# when


def test_a_condition_on_progress_is_a_window(served: DiffusionEngine) -> None:
    when = {"progress": {"at_least": 0.25, "below": 0.75}}
    window = replace(PUSH, schedule={"type": "window", "start": 0.25, "stop": 0.75})
    [(request, result), (same, its)] = tiny.run(
        served,
        replace(PLAIN, interventions=(replace(PUSH, when=when),)),
        replace(PLAIN, interventions=(window,)),
    )
    assert request.response == same.response != tiny.tokens_of(served, PLAIN)
    assert result.receipt is not None and its.receipt is not None
    [told], [expected] = result.receipt["interventions"], its.receipt["interventions"]
    assert told["strength_per_step"] == expected["strength_per_step"]
    assert told["sites"] == expected["sites"]
    assert (told["when"], told["held_passes"]) == (when, 4)
    [plan] = request.plan["interventions"]
    assert plan["strength_per_step"] is None
    assert "while its condition holds" in plan["notes"][0]


def test_a_condition_that_always_holds_changes_nothing_and_one_that_never_does_is_no_push(
    served: DiffusionEngine,
) -> None:
    pushed = tiny.tokens_of(served, replace(PLAIN, interventions=(PUSH,)))
    assert tiny.tokens_of(served, replace(PLAIN, interventions=(replace(PUSH, when=ALWAYS),))) == pushed
    [(request, result)] = tiny.run(served, replace(PLAIN, interventions=(replace(PUSH, when=NEVER),)))
    assert request.response == tiny.tokens_of(served, PLAIN)
    assert result.receipt is not None
    [told] = result.receipt["interventions"]
    assert (told["applied"], told["held_passes"]) == (False, 0)
    assert "nothing was changed" in told["notes"][-1]


def test_a_reading_decides_about_the_next_forward(served: DiffusionEngine) -> None:
    """Against what a trace of the same run tells: the push holds after each reading above the bound."""
    trace = TraceParams(("register/archaic",))
    _, _, plain = solo(served, replace(PLAIN, trace=trace))
    values = sorted(one.values["register/archaic"] for one in plain.result.trace)
    when = {"attribute": "register/archaic", "above": values[4]}
    push = replace(PUSH, attribute="topic/sports", strength=2.0, when=when)
    _, _, done = solo(served, replace(PLAIN, trace=trace, interventions=(push,)))
    read = [one.values["register/archaic"] for one in done.result.trace]
    assert done.result.receipt is not None
    told = done.result.receipt["interventions"][0]
    held = [False, *(value > values[4] for value in read)][:8]
    assert [strength > 0 for strength in told["strength_per_step"]] == held
    assert any(held) and not all(held)
    assert told["held_passes"] == sum(held)


def test_a_watched_row_is_the_same_alone_and_in_any_batch(served: DiffusionEngine) -> None:
    values = {"attribute": "register/archaic", "above": 0.0}
    feature = {"feature": {"sae": "layer-2-mask", "index": 5}, "over": "mean", "above": 0.4}
    rows = [
        replace(PLAIN, interventions=(replace(PUSH, when={"any": [values, feature]}),)),
        replace(PLAIN, row=1, remask_when={"condition": {"progress": {"at_least": 0.5}}, "span": "response"}),
        replace(PLAIN, row=2, max_tokens=40, steps=20, prompt="the team won the match then", interventions=(PUSH,)),
        replace(PLAIN, row=3, abort_when={"progress": {"above": 0.5}}),
    ]
    together = tiny.run(served, *rows)
    for params, (request, result) in zip(rows, together, strict=True):
        [(alone, its)] = tiny.run(served, params)
        assert request.response == alone.response
        assert (result.text, result.steps, result.finish_reason) == (its.text, its.steps, its.finish_reason)


# readings


def states_of(model: Any, canvas: list[int], layer: int) -> torch.Tensor:
    kept: dict[int, torch.Tensor] = {}

    def site(at: int, hidden: torch.Tensor) -> torch.Tensor:
        kept[at] = hidden[0]
        return hidden

    model(torch.tensor([canvas]), sites=site)
    return kept[layer]


class Absolute(Activation):
    """An activation that no shortcut knows."""

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        return pre.abs()


@pytest.mark.parametrize("activation", [Relu(), JumpRelu(torch.full((tiny.FEATURES,), 2.0)), Absolute()])
@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("family", ["bert", "dream"])
def test_a_feature_is_read_as_its_sae_encodes_it(
    tmp_path: Path, activation: Activation, over: Any, family: str
) -> None:
    model: BertDiffusionLM | DreamDiffusionLM = tiny.bert() if family == "bert" else tiny.dream()
    catalogue = tiny.catalogue(model, tmp_path)
    like = tiny.sae(1, seed=4)
    tensors = {name: getattr(like, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    facts = SaeFacts("own", 1, tiny.HIDDEN, tiny.FEATURES, "any", sha256="0" * 64)
    sae = SparseAutoencoder(facts, tensors, activation, like.stats)
    catalogue = replace(catalogue, saes={"own": sae})
    readings = [
        Quantity(sae="own", feature=7, over=over),
        Quantity(sae="own", feature=8, over=over, unit="max_act"),
        Quantity(attribute="topic/sports", over=over),
    ]
    gauges: list[tuple[int, Readout]] = [(row, gauge(catalogue, one, "p")) for one in readings for row in range(2)]
    canvases = [[5, 6, *([tiny.MASK] * 6)], [7, 8, 9, tiny.MASK, 20, tiny.MASK, 30, 31]]
    hidden = torch.stack([states_of(model, canvas, 1) for canvas in canvases])
    response = torch.tensor([[False] * 2 + [True] * 6, [False] * 3 + [True] * 4 + [False]])
    states = (torch.arange(8) - model.facts.shift).clamp(min=0)
    found = ReadoutBatch(gauges, torch.device("cpu")).read({1: hidden}, response, states).tolist()
    expected = []
    attribute = catalogue.attributes["topic/sports"]
    for reading in readings:
        for row in range(2):
            deciding = hidden[row][states][response[row]]
            values = (
                sae.encode(deciding)[:, reading.feature] if reading.sae else deciding @ attribute.directions[1, "sae"]
            )
            scale = 6.0 if reading.sae is None else 1.0
            if reading.unit == "max_act":
                assert like.stats is not None
                scale = float(like.stats.max_act[8])
            expected.append(float(values.mean() if over == "mean" else values.max()) / scale)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_reading_does_not_depend_on_the_width_of_the_canvas_or_on_other_gauges(served: DiffusionEngine) -> None:
    readings = [
        Quantity(sae="layer-2-mask", feature=5, over="mean"),
        Quantity(attribute="register/archaic"),
        Quantity(attribute="topic/sports", read="activation"),
    ]
    model, catalogue = served.model, served.catalogue
    with pytest.raises(RequestError, match="which is not loaded"):
        gauge(catalogue, Quantity(attribute="register/archaic", read="activation"), "p")
    catalogue = replace(
        catalogue, saes={name: one for name, one in catalogue.saes.items() if name != "layer-2-visible"}
    )
    gauges = [(0, gauge(catalogue, replace(one), "p")) for one in readings]
    hidden = {
        layer: torch.randn(3, 64, tiny.HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in range(3)
    }
    response = (torch.arange(64) >= 3) & (torch.arange(64) < 13)
    wide = ReadoutBatch([(2, one) for _, one in gauges] + gauges, torch.device("cpu"))
    swapped = {layer: one[[1, 2, 0]] for layer, one in hidden.items()}
    found = wide.read(swapped, response.expand(3, -1), torch.arange(64))
    for index, (row, one) in enumerate(gauges):
        narrow = {layer: state[:1, :16] for layer, state in hidden.items()}
        alone = ReadoutBatch([(row, one)], torch.device("cpu")).read(narrow, response[None, :16], torch.arange(16))
        assert found[index] == alone[0]
    assert model.facts.shift == 0


# abort


def test_a_row_that_is_ended_loses_no_token_behind_a_gap(served: DiffusionEngine) -> None:
    """In any order: its text and what its receipt lists are together all that was committed, each in its place."""
    for order in ("random", "confidence", "sae_stability"):
        params = replace(PLAIN, order=order, abort_when={"progress": {"at_least": 0.5}})
        request, events, done = solo(served, params)
        assert done.result.receipt is not None
        placed = dict(enumerate(done.result.tokens))
        for run in done.result.receipt["aborted"]["behind_gap"]:
            assert run["position"] > len(done.result.tokens)
            assert run["text"] == served._text(request, run["tokens"])
            placed |= {run["position"] + i: token for i, token in enumerate(run["tokens"])}
        committed = {i: token for i, token in enumerate(rebuilt(events, request)) if token != tiny.MASK}
        assert placed == committed
        assert len(committed) == 8


def test_a_row_ends_with_what_stands_without_a_gap(served: DiffusionEngine) -> None:
    params = replace(PLAIN, abort_when={"progress": {"at_least": 0.5}}, logprobs=True)
    request, events, done = solo(served, params)
    full = tiny.tokens_of(served, PLAIN)
    tokens = rebuilt(events, request)
    gap = tokens.index(tiny.MASK)
    assert sum(token != tiny.MASK for token in tokens) == 8
    assert list(done.result.tokens) == tokens[:gap] == full[:gap]
    assert done.result.logprobs is not None and len(done.result.logprobs) == gap
    assert (done.result.finish_reason, done.result.steps) == ("content_filter", 4)
    assert done.result.receipt is not None
    told = done.result.receipt["aborted"]
    assert (told["step"], told["progress"], told["answer"]) == (3, 0.5, "committed")
    assert not served.running and not served.waiting


def test_a_row_that_takes_tokens_back_keeps_what_it_has_when_it_ends(served: DiffusionEngine) -> None:
    params = replace(PLAIN, order="random", transfer={"type": "remdm", "eta": 0.3}, abort_when=ALWAYS, steps=2)
    request, events, done = solo(served, params)
    tokens = [*rebuilt(events, request), tiny.MASK]
    assert list(done.result.tokens) == tokens[: tokens.index(tiny.MASK)]
    assert done.result.finish_reason == "content_filter"


def test_an_end_that_does_not_come_changes_nothing(served: DiffusionEngine) -> None:
    request, _, done = solo(served, replace(PLAIN, abort_when=NEVER))
    assert request.response == tiny.tokens_of(served, PLAIN)
    assert done.result.finish_reason == "length"
    assert done.result.receipt is not None
    assert done.result.receipt["aborted"] is None


def test_the_last_step_may_end_a_row_too(served: DiffusionEngine) -> None:
    request, _, done = solo(served, replace(PLAIN, abort_when={"progress": {"at_least": 1.0}}))
    assert list(done.result.tokens) == request.response
    assert done.result.finish_reason == "content_filter"


# remask

SAMPLERS: list[dict[str, Any]] = [
    {"order": "confidence", "transfer": "linear"},
    {"order": "random", "transfer": "linear", "block_length": 4},
    {"order": "margin", "transfer": "cosine", "block_length": 8, "steps": 6},
    {"order": "confidence", "transfer": {"type": "threshold", "value": 0.3}, "block_length": 8},
    {"order": "random", "transfer": {"type": "ddpm"}},
    {"order": "random", "transfer": {"type": "remdm", "eta": 0.3}, "block_length": 8},
    {"order": "sae_stability", "transfer": "linear", "steps": 16},
    {"order": "random", "transfer": "linear", "max_tokens": 10, "steps": 20, "block_length": 5},
    {"order": "random", "transfer": "linear", "max_tokens": 15, "steps": 10},
]


SPANS: list[Any] = ["block", "response", {"positions": [3, 9]}]
CONDITIONS: list[dict[str, Any]] = [{"progress": {"at_least": 0.5}}, {"progress": {"at_least": 1.0}}, ALWAYS]
# Each sampler with each span, and with each condition: a Latin square.
REWRITTEN = [
    (sampler, span, CONDITIONS[(i + j) % 3]) for i, sampler in enumerate(SAMPLERS) for j, span in enumerate(SPANS)
]


@pytest.mark.parametrize(("sampler", "span", "condition"), REWRITTEN)
def test_a_rewritten_row_ends_whole_within_its_steps_and_replays(
    served: DiffusionEngine, sampler: dict[str, Any], span: Any, condition: dict[str, Any]
) -> None:
    remask = {"condition": condition, "span": span, "times": 2}
    request, events, done = solo(served, replace(PLAIN, **sampler, remask_when=remask))
    assert rebuilt(events, request) == request.response
    assert tiny.MASK not in request.response
    assert done.result.finish_reason == "length"
    ending = 3 * request.blocks if request.transfer.ending != "none" else 0
    assert done.result.steps <= request.plan["max_steps"] + ending
    assert request.plan["max_steps"] == 3 * request.steps
    assert request.plan["revises"] is True
    assert done.result.receipt is not None
    told = done.result.receipt["remasked"]
    assert len(told) <= 2
    revised = [event for event in events if isinstance(event, Revised)]
    if not request.transfer.remasks:
        assert [(event.step, len(event.positions)) for event in revised] == [
            (one["step"], one["positions"]) for one in told
        ]


def test_the_whole_response_is_written_again_with_fresh_noise(served: DiffusionEngine) -> None:
    remask = {"condition": {"progress": {"at_least": 1.0}}, "span": "response"}
    request, events, done = solo(served, replace(PLAIN, remask_when=remask))
    assert done.result.steps == 16
    first = rebuilt([event for event in events if isinstance(event, Committed) and event.step < 8], request)
    assert first == tiny.tokens_of(served, PLAIN)
    assert request.response != first
    assert done.result.receipt is not None
    assert done.result.receipt["remasked"] == [{"step": 7, "progress": 1.0, "span": [0, 16], "positions": 16}]


def test_a_part_is_written_again_in_the_steps_that_usually_write_so_much(served: DiffusionEngine) -> None:
    remask = {"condition": {"progress": {"at_least": 1.0}}, "span": {"positions": [4, 8]}}
    request, events, done = solo(served, replace(PLAIN, remask_when=remask))
    assert done.result.steps == 10
    plain = tiny.tokens_of(served, PLAIN)
    assert request.response[:4] + request.response[8:] == plain[:4] + plain[8:]
    assert [len(event.positions) for event in events if isinstance(event, Committed)] == [2] * 10


def test_blocks_between_are_not_written_again(served: DiffusionEngine) -> None:
    """Back to the first block from the middle of the third; the second is full and is passed over."""
    params = replace(PLAIN, block_length=4, steps=8)
    remask = {"condition": {"progress": {"at_least": 0.6}}, "span": {"positions": [0, 2]}}
    request, events, done = solo(served, replace(params, remask_when=remask))
    plain = tiny.tokens_of(served, params)
    assert request.response[2:8] == plain[2:8]
    assert done.result.steps == 9
    where = [event.positions for event in events if isinstance(event, Committed)]
    assert set(where[5]) == {0, 1}
    assert all(8 <= position < 12 for position in where[6])


def test_nothing_is_settled_that_may_be_taken_back(served: DiffusionEngine) -> None:
    """The engine's own prefix never shrinks, and holds no token that is revised later."""
    for span, block in (("block", 4), ("response", 4), ({"positions": [5, 9]}, 16)):
        remask = {"condition": {"progress": {"at_least": 0.4}}, "span": span, "times": 3}
        request = served.admit(replace(PLAIN, block_length=block, remask_when=remask))
        served.add([request])
        settled: list[int] = []
        while not request.finished:
            served.step()
            assert request.response[: len(settled)] == settled
            settled = request.response[: request.prefix]
            assert tiny.MASK not in settled


def test_a_stop_string_ends_a_row_that_can_no_longer_be_rewritten(served: DiffusionEngine) -> None:
    params = replace(PLAIN, order="random", stop=("e",), steps=16)
    remask = {"condition": {"progress": {"at_least": 0.3}}, "span": "response"}
    _, events, done = solo(served, replace(params, remask_when=remask))
    assert "e" not in done.result.text
    assert isinstance(events[-1], Done)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"abort_when": {"attribute": "nope", "above": 0}}, "abort_when", "unknown attribute 'nope'"),
        ({"abort_when": {"above": 0}}, "abort_when", "abort_when: it must have exactly one"),
        ({"abort_when": {"feature": {"sae": "nope", "index": 0}, "above": 0}}, "abort_when", "unknown sae 'nope'"),
        (
            {"abort_when": {"feature": {"sae": "layer-1-mask", "index": 48}, "above": 0}},
            "abort_when",
            "features 0 to 47, got 48",
        ),
        (
            {"abort_when": {"feature": {"sae": "layer-1-mask", "index": 0}, "unit": "max_act", "above": 0}},
            "abort_when",
            "is not known or 0",
        ),
        ({"remask_when": {"condition": ALWAYS, "times": 99}}, "remask_when", "times must be"),
        ({"remask_when": {"condition": ALWAYS, "span": {"positions": [3, 17]}}}, "remask_when", "0 to 16, got"),
        ({"remask_when": {"condition": ALWAYS, "times": 16}, "steps": 1008}, "remask_when", "at most 1024 are made"),
        ({"interventions": (replace(PUSH, when={}),)}, "interventions[0].when", "when: it must have exactly one"),
        (
            {"interventions": (PUSH, replace(PUSH, when={"attribute": "nope", "above": 0}))},
            "interventions[1].when",
            "unknown attribute 'nope'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(
    served: DiffusionEngine, changes: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises((RequestError, NotFoundError), match=said) as error:
        served.admit(replace(PLAIN, **changes))
    assert error.value.param == param
