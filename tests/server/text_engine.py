"""A second implementation of the engine seam, in plain Python: it denoises bytes of a text in a seeded order.

It keeps the contract of `steerserve.engine.api.base.Engine` (checks at admission, atomic add, aborts before the next
step, one terminal event a row), so what the server does with it, it does with any engine. With transfer `remdm` it
changes its mind: it commits what it may take back later, other tokens than those of the text among them.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.engine.api.events import (
    Committed,
    Done,
    Event,
    Failed,
    Result,
    Revised,
    Scored,
    Steered,
    Stepped,
    Trace,
)
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import Vocabulary, continuation
from steerserve.errors import NotFoundError, QueueFullError, RequestError, TooLongError
from steerserve.server.app import create_app
from steerserve.server.service import Service

END = 256
WORDS = ("naïve", "the", "▯", "stop", "sea", "📈", "won", "\n", "of", "café")
ATTRIBUTES = ("topic/sports", "sentiment/positive")
SAMPLERS = {"order": ("confidence", "random"), "transfer": ("linear", "cosine", "remdm")}
VOCABULARY = Vocabulary(
    name=lambda token: "<end>" if token == END else f"token_id:{token}",
    raw=lambda token: bytes([token]) if token < END else None,
    is_skipped=lambda token: token >= END,
)
SLIPS = (*b"ae st", *"é".encode(), END)
"""Tokens that are committed by mistake."""


def decode(ids: Sequence[int]) -> str:
    """A text's first space is dropped, as many tokenizers do: what a token says depends on what stands before it."""
    return bytes(token for token in ids if token != END).decode("utf-8", errors="replace").removeprefix(" ")


def response_tokens(params: GenerationParams) -> list[int]:
    """What a row denoises to: words drawn by seed and row, in capitals where it is steered, perhaps ended early."""
    if not params.max_tokens:
        return []
    draw = random.Random(f"{params.seed} {params.row} {params.prompt}")
    text = "".join(" " + draw.choice(WORDS) for _ in range(params.max_tokens))
    if any(one.strength != 0 for one in params.interventions):
        text = text.upper()
    tokens = list(text.encode())[: params.max_tokens]
    if draw.random() < 0.5:
        tokens[draw.randrange(len(tokens))] = END
    return tokens


@dataclass
class TextRequest:
    id: str
    params: GenerationParams
    prompt_ids: tuple[int, ...]
    plan: dict[str, Any]
    tokens: list[int]
    order: list[int]
    steps: int
    step: int = 0
    traces: list[Trace] = field(default_factory=list)
    suffix_ids: tuple[int, ...] = ()
    since: int = 0
    earlier: list[tuple[float | None, int]] = field(default_factory=list)
    """Strengths of interventions that were replaced, and until when they held."""
    held: dict[int, int] = field(default_factory=dict)
    """What is committed of a row that may take it back."""

    @property
    def revises(self) -> bool:
        return bool(self.plan.get("revises"))


class TextEngine:
    """Denoises rows together, `max_rows` at once; `before_step` runs first in each step, to fail or to wait."""

    def __init__(self, max_rows: int = 8, max_queue: int = 256) -> None:
        self.max_rows = max_rows
        self.max_queue = max_queue
        self.before_step: Callable[[], None] = lambda: None
        self.waiting: list[TextRequest] = []
        self.running: list[TextRequest] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.closed = False
        self.steps = 0
        self._events: list[Event] = []
        self._count = 0
        self._admission = threading.Lock()
        self._owner: int | None = None

    def admit(self, params: GenerationParams) -> TextRequest:
        for name, known in SAMPLERS.items():
            if getattr(params, name) not in (None, *known):
                raise RequestError(f"{name}: unknown name, known: {', '.join(known)}", name)
        if params.prompt == "bad":
            raise RequestError("prompt: bad", "prompt")
        if params.max_tokens > 512:
            raise TooLongError(f"max_tokens: got {params.max_tokens}, at most 512", "max_tokens", 512)
        for index, one in enumerate(params.interventions):
            if one.attribute is not None and one.attribute not in ATTRIBUTES:
                raise NotFoundError(f"no attribute {one.attribute!r}", f"interventions[{index}].attribute")
        for index, name in enumerate(params.verdicts):
            if name not in ATTRIBUTES:
                raise NotFoundError(f"no attribute {name!r}", f"verdicts[{index}]")
        prompt_ids = tuple(params.prompt.encode()) if isinstance(params.prompt, str) else params.prompt
        if any(token > END for token in prompt_ids):
            raise RequestError(f"prompt: token ids must be 0 to {END}", "prompt")
        steps = max(1, min(params.steps or params.max_tokens, params.max_tokens))
        tokens = response_tokens(params)
        order = list(range(len(tokens)))
        random.Random(f"{params.seed} {params.row}").shuffle(order)
        with self._admission:
            self._count += 1
            request_id = f"row-{self._count}"
        plan: dict[str, Any] = {
            "steps": steps,
            "interventions": [{"attribute": one.attribute} for one in params.interventions],
        }
        if params.transfer == "remdm":
            plan |= {"revises": True, "revised_within": params.max_tokens}
        return TextRequest(request_id, params, prompt_ids, plan, tokens, order, steps)

    def add(self, requests: list[TextRequest]) -> None:
        self._own()
        if len(self.waiting) + len(requests) > self.max_queue:
            raise QueueFullError(f"{len(self.waiting)} rows wait", retry_after=2.5)
        self.waiting.extend(requests)

    def abort(self, request_id: str) -> None:
        self._own()
        for rows in (self.waiting, self.running):
            for request in rows:
                if request.id == request_id:
                    self.aborted.append(request_id)
                    rows.remove(request)
                    self._events.append(Failed(request_id, "aborted", aborted=True))
                    return

    def steer(self, request_id: str, request: TextRequest) -> int | None:
        self._own()
        for mine in [*self.waiting, *self.running]:
            if mine.id == request_id:
                mine.earlier += [(one.strength, mine.step) for one in mine.params.interventions if mine.step]
                done = set(mine.order[: round(len(mine.order) * mine.step / mine.steps)])
                mine.tokens = [
                    old if position in done else new
                    for position, (old, new) in enumerate(zip(mine.tokens, request.tokens, strict=True))
                ]
                mine.params, mine.plan, mine.since = request.params, request.plan, mine.step
                self._events.append(Steered(mine.id, mine.step, tuple(mine.plan["interventions"])))
                return mine.step
        return None

    def step(self) -> list[Event]:
        self._own()
        self.before_step()
        self.steps += 1
        while self.waiting and len(self.running) < self.max_rows:
            self.running.append(self.waiting.pop(0))
        events, self._events = self._events, []
        for request in list(self.running):
            events += self._advance(request)
        return events

    def close(self) -> None:
        self._own()
        self.closed = True

    def load(self) -> Mapping[str, Any]:
        return {
            "queue_length": len(self.waiting),
            "running_rows": len(self.running),
            "max_queue": self.max_queue,
            "max_rows": self.max_rows,
        }

    def _own(self) -> None:
        self._owner = self._owner or threading.get_ident()
        assert self._owner == threading.get_ident(), "only admit may be called from another thread"

    def _advance(self, request: TextRequest) -> list[Event]:
        params, size = request.params, len(request.order)
        events: list[Event] = []
        if params.tell_steps:
            events.append(Stepped(request.id, request.step + 1, request.step + 1))
        if params.trace is not None and request.step % params.trace.every == 0:
            values = dict.fromkeys(params.trace.attributes, 0.5)
            request.traces.append(Trace(request.id, request.step, request.step / request.steps, values))
            events.append(request.traces[-1])
        done, until = (round(size * step / request.steps) for step in (request.step, request.step + 1))
        request.step += 1
        if request.revises:
            events += self._change(request, until)
        elif positions := tuple(request.order[done:until]):
            tokens = tuple(request.tokens[position] for position in positions)
            events.append(committed(request, positions, tokens))
        if request.step == request.steps:
            self.running.remove(request)
            self.finished.append(request.id)
            events.append(Done(request.id, result_of(request)))
        return events

    def _change(self, request: TextRequest, until: int) -> list[Event]:
        """Take some of what is committed back, and commit what else is due; what is held at the end is the text."""
        draw = random.Random(f"{request.params.seed} {request.params.row} {request.step}")
        last = request.step == request.steps
        due = [p for p in request.order[:until] if p not in request.held and (last or draw.random() < 0.8)]
        taken = () if last else tuple(p for p in request.held if draw.random() < 0.3)
        for position in taken:
            del request.held[position]
        tokens = tuple(draw.choice(SLIPS) if draw.random() < 0.3 else request.tokens[p] for p in due)
        request.held |= dict(zip(due, tokens, strict=True))
        if last:
            request.tokens = [request.held[position] for position in sorted(request.held)]
        events: list[Event] = [Revised(request.id, request.step - 1, taken)] if taken else []
        return [*events, committed(request, tuple(due), tokens)] if due else events


def committed(request: TextRequest, positions: tuple[int, ...], tokens: tuple[int, ...]) -> Committed:
    logprobs = tuple(-0.5 for _ in positions) if request.params.logprobs else None
    return Committed(request.id, request.step - 1, positions, tokens, logprobs)


def result_of(request: TextRequest) -> Result:
    params, tokens = request.params, request.tokens
    ended = END in tokens
    tokens = tokens[: tokens.index(END)] if ended else tokens
    text = continuation(decode, request.prompt_ids, tokens)
    cuts = [text.index(stop) for stop in params.stop if stop in text]
    return Result(
        tokens=tuple(tokens),
        text=text[: min(cuts)] if cuts else text,
        finish_reason="stop" if cuts or ended else "length",
        steps=request.steps,
        forward_passes=request.steps,
        prompt_tokens=len(request.prompt_ids),
        receipt=receipt_of(request),
        trace=tuple(request.traces),
        logprobs=tuple(-0.5 for _ in tokens) if params.logprobs else None,
        top_logprobs=tuple(likeliest(token)[: params.top_logprobs] for token in tokens)
        if params.top_logprobs
        else None,
        prompt=scored_prompt(request),
        verdicts={name: random.Random(f"{name} {text}").gauss(0, 3) for name in params.verdicts} or None,
    )


def scored_prompt(request: TextRequest) -> tuple[Scored | None, ...] | None:
    """Each token of the prompt but the first, as likely as its letter is early."""
    if not request.params.prompt_logprobs:
        return None
    found = [Scored(one, -one / 64, likeliest(one)[: request.params.top_logprobs]) for one in request.prompt_ids]
    return (None, *found[1:]) if found else ()


def likeliest(token: int) -> tuple[tuple[int, float], ...]:
    """The token itself, then letters."""
    return ((token, -0.5), *((letter, -float(i)) for i, letter in enumerate(b"abcdefghijklmnopqrstu", 1)))


def receipt_of(request: TextRequest) -> dict[str, Any] | None:
    told: list[dict[str, Any]] = [{"strength": strength, "until_step": end} for strength, end in request.earlier]
    begun = {"from_step": request.since} if request.since else {}
    told += [{"strength": one.strength} | begun for one in request.params.interventions]
    return {"interventions": told} if told else None


def service_of(engine: TextEngine) -> Service:
    return Service(
        engine=engine,
        model_id="text",
        created=1_700_000_000,
        decode=decode,
        vocabulary=VOCABULARY,
        end_ids=frozenset({END}),
        max_length=512,
        load=engine.load,
        model_card={"sha256": "0123456789abcdef" * 4},
        attributes={name: {"layers": [1], "unit": "residual"} for name in ATTRIBUTES},
        saes={"layer-1": {"layer": 1, "width": 16}},
        capabilities={"operators": ["add"]},
    )


def template(messages: Sequence[Mapping[str, Any]]) -> str:
    """A line a message, and the beginning of the answer."""
    if any(message["content"] == "refused" for message in messages):
        raise RequestError("the template refuses", "messages")
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def with_chat(service: Service) -> Service:
    """The service of a model that has a chat template."""
    return replace(service, chat=template)


@contextmanager
def serving(
    engine: TextEngine, config: ServerConfig | None = None, service: Service | None = None
) -> Iterator[TestClient]:
    """A client of a started app; leaving it shuts the app down."""
    app = create_app(service or service_of(engine), config or ServerConfig(drain_seconds=5))
    with TestClient(app) as client:
        yield client
