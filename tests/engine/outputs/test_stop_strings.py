"""A stop string is looked for in characters that no further token changes, whatever the tokens are made of."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Committed, Done, Revised
from steerserve.engine.api.params import GenerationParams, Refine
from steerserve.engine.api.text import cut_at_stop, vocabulary
from steerserve.engine.engine import TorchEngine
from steerserve.server.answers.canvas import Canvas
from tests import tiny
from tests.engine.outputs.test_verdicts import ARCHAIC, with_probe

CHARACTERS = ("a", "b", " ", "é", "€", "🙂", "\ufffd")
BYTES = sorted({byte for character in CHARACTERS for byte in character.encode()} | {0xFF})
STOPS = ("\ufffd", "a\ufffd", "é")
PARAMS = GenerationParams(prompt=(7, 9), max_tokens=24, temperature=1.0, ignore_eos=True)


def by_level() -> Tokenizer:
    """Byte-level BPE: each token a byte, of few characters, in the characters that stand for them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    made = of_units(lambda byte: chr(byte) if byte in printable else chr(256 + others.index(byte)))
    made.decoder = decoders.ByteLevel()
    return made


def by_fallback() -> Tokenizer:
    """SentencePiece's byte fallback, where a run of bytes is decoded as a whole; letters are pieces too."""
    made = of_units(lambda byte: f"<0x{byte:02X}>")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def of_units(unit: Callable[[int], str]) -> Tokenizer:
    units = [*tiny.SPECIAL, *map(unit, BYTES), "won", "sea"]
    units += [f"w{i}" for i in range(tiny.VOCAB - len(units))]
    made = Tokenizer(models.BPE({one: i for i, one in enumerate(units)}, [], unk_token="[UNK]"))
    made.add_special_tokens(list(tiny.SPECIAL))
    return made


@pytest.fixture(scope="module", params=[by_level, by_fallback])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    model = tiny.bert()
    # No other tokens than these are drawn, so that texts are full of broken characters.
    last = tiny.MASK + len(BYTES) + 2
    model.facts = replace(model.facts, forbidden_ids=(*model.facts.forbidden_ids, *range(last + 1, tiny.VOCAB)))
    catalogue = with_probe(model, tmp_path_factory.mktemp("attributes"), 1).catalogue
    return TorchEngine(model, request.param(), catalogue, EngineConfig())


def streamed(served: TorchEngine, params: GenerationParams) -> tuple[str, str, int]:
    """A row's text, what its stream sent before the end and then the rest, and its steps."""
    request = served.admit(params)
    served.add([request])

    def behind(ids: object) -> str:
        return served._text(request, list(ids))  # type: ignore[call-overload]

    within = request.plan["revised_within"] if request.plan["revises"] else None
    canvas = Canvas(behind, frozenset({tiny.EOS}), params.max_tokens, params.stop, within, vocabulary(served.tokenizer))
    sent = ""
    for event in tiny.drain(served):
        if isinstance(event, Committed):
            canvas.commit(event)
        elif isinstance(event, Revised):
            canvas.revise(event)
        elif isinstance(event, Done):
            return event.result.text, sent + canvas.rest(event.result.text), event.result.steps
        sent += canvas.grown()
        # What is shown of a text in the making has no mark for what may become a character beside a mask.
        assert "\ufffd▯" not in canvas.provisional() and "▯\ufffd" not in canvas.provisional()
    raise AssertionError("the row did not end")


@pytest.mark.parametrize("fields", [{"order": "confidence"}, {"block_length": 1}, {"transfer": "remdm"}], ids=str)
def test_rows_end_at_the_stop_string_of_their_whole_text(served: TorchEngine, fields: dict[str, str]) -> None:
    early = 0
    for seed in range(3):
        params = replace(PARAMS, seed=seed, **fields)  # type: ignore[arg-type]
        whole, joined, steps = streamed(served, params)
        assert joined == whole
        for stop in STOPS:
            text, joined, made = streamed(served, replace(params, stop=(stop,)))
            assert (text, joined) == (cut_at_stop(whole, [stop])[0],) * 2
            early += made < steps
    assert early or "block_length" not in fields, "no row was ended by its stop string"


def test_refinement_writes_what_stands_before_the_stop_string(served: TorchEngine) -> None:
    """It masks no token behind it, and goes on from the beginning that holds it as a whole character."""
    for seed in range(3):
        params = replace(PARAMS, seed=seed, stop=("\ufffd",), verdicts=(ARCHAIC,), refine=Refine(rounds=3, span=4))
        text, joined, _ = streamed(served, params)
        assert text == joined
        assert "\ufffd" not in text
