"""What a forward takes: rows join within a bound of tokens and of bytes, and what fits nowhere is refused."""

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.engine.batching.memory import Costs, MemoryUse, footprint
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward import head
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from steerserve.models.families.bert import BertDiffusionLM
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=4, temperature=1.0, ignore_eos=True)
PUSH = Intervention(vector=VectorRef(1, tuple(range(tiny.HIDDEN))), op="clamp", unit="raw", strength=0.5)


class Widths:
    """Notes the size of every canvas batch that a model is given."""

    def __init__(self, model: DiffusionLM) -> None:
        self.seen: list[tuple[int, int]] = []
        model.register_forward_pre_hook(lambda _, given: self.seen.append(tuple(given[0].shape)))


class Heads(BertDiffusionLM):
    """Notes of how many states logits are made at once."""

    def __init__(self) -> None:
        super().__init__(tiny.BERT)
        tiny.randomise(self, 0)
        self.seen: list[int] = []

    def head(self, hidden: Tensor) -> Tensor:
        self.seen.append(len(hidden))
        return super().head(hidden)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, Any] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.live:
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                self.live[key] = weakref.ref(storage, partial(self._forget, key, size))
        return out

    def _forget(self, key: int, size: int, _: object) -> None:
        del self.live[key]
        self.now -= size


def test_rows_join_within_the_token_budget_and_run_alone_beyond_it(tmp_path: Path) -> None:
    model = tiny.bert()
    served = tiny.engine(model, tmp_path, max_batch_tokens=64)
    asked = [replace(PLAIN, seed=seed, max_tokens=12 if seed % 3 else 80, steps=4) for seed in range(9)]
    alone = [tiny.tokens_of(served, params) for params in asked]
    widths = Widths(model)
    assert [request.response for request, _ in tiny.run(served, *asked)] == alone
    assert max(rows * width for rows, width in widths.seen if rows > 1) == 64
    assert {rows for rows, width in widths.seen if width > 64} == {1}


def test_a_guided_row_counts_twice(tmp_path: Path) -> None:
    model = tiny.bert()
    served = tiny.engine(model, tmp_path, max_batch_tokens=64)
    widths = Widths(model)
    tiny.run(served, *[replace(PLAIN, seed=seed, cfg_scale=1.0) for seed in range(4)])
    assert {rows for rows, _ in widths.seen} == {4}


def test_a_row_that_comes_to_be_measured_waits_where_its_twin_has_no_place(tmp_path: Path) -> None:
    model = tiny.bert()
    served = tiny.engine(model, tmp_path, max_batch_tokens=64)
    asked = [replace(PLAIN, seed=seed, measure_kl=True) for seed in range(4)]
    alone = [tiny.tokens_of(served, params) for params in asked[1:]]
    requests = [served.admit(params) for params in asked]
    served.add(requests)
    served.step()
    widths = Widths(model)
    patch = served.admit(replace(asked[0], interventions=(PUSH,)))
    assert served.steer(requests[0].id, patch) == 1
    found = tiny.results(tiny.drain(served))
    assert max(rows for rows, _ in widths.seen) <= 4
    assert [request.response for request in requests[1:]] == alone
    receipt = found[requests[0].id].receipt
    assert receipt is not None and receipt["measured_kl"] > 0


def test_rows_join_within_the_memory_budget(tmp_path: Path) -> None:
    model = tiny.bert()
    free = tiny.engine(model, tmp_path / "free")
    one = footprint(free.admit(PLAIN), model.facts)
    two = Costs.of(model).bytes_of(one + one)
    served = tiny.engine(model, tmp_path / "bound", max_batch_bytes=two)
    widths = Widths(model)
    tiny.run(served, *[replace(PLAIN, seed=seed) for seed in range(5)])
    assert max(rows for rows, _ in widths.seen) == 2


def test_a_row_that_would_not_fit_alone_is_refused_with_both_numbers(tmp_path: Path) -> None:
    model = tiny.bert()
    need = Costs.of(model).bytes_of(MemoryUse(1, 48, 40))
    served = tiny.engine(model, tmp_path, max_batch_bytes=need)
    served.admit(replace(PLAIN, prompt=(5,) * 4, max_tokens=40, steps=4))
    with pytest.raises(RequestError, match=r"a canvas of 96 tokens takes about \S+ .iB of memory in a") as error:
        served.admit(replace(PLAIN, max_tokens=80, steps=4))
    assert error.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("family", "interventions", "cache"),
    [(family, push, None) for family in ("bert", "llada", "dream", "mdlm") for push in ((), (PUSH,))]
    + [(family, (PUSH,), "dual") for family in ("bert", "llada", "dream")],
)
def test_the_estimate_is_above_what_a_step_takes_and_not_far(
    tmp_path: Path, family: str, interventions: tuple[Intervention, ...], cache: str | None
) -> None:
    model: DiffusionLM = getattr(tiny, family)()
    served: DiffusionEngine = tiny.engine(model, tmp_path)
    rows = [
        served.admit(replace(PLAIN, prompt=(5,) * 8, max_tokens=80, row=row, interventions=interventions, cache=cache))
        for row in range(8)
    ]
    served.add(rows)
    with Peak() as peak:
        served.step()
    estimate = served.batcher.limits.costs.bytes_of(sum((footprint(row, model.facts) for row in rows), MemoryUse()))
    assert estimate / 5 < peak.most < estimate


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg_scale": 1.0},
        {"logprobs": True, "top_logprobs": 5},
        {"logprobs": True, "top_logprobs": 5, "cfg_scale": 1.0},
        {"measure_kl": True, "interventions": (PUSH,)},
    ],
)
def test_logits_are_never_made_of_more_states_than_fit_into_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    model = Heads()
    served = tiny.engine(model, tmp_path)
    rows = [replace(PLAIN, max_tokens=40, steps=2, row=row, **changes) for row in range(2)]
    whole = tiny.run(served, *rows)
    assert max(model.seen) > 32
    model.seen = []
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * tiny.VOCAB * 32)
    parts = tiny.run(served, *rows)
    assert max(model.seen) == 32
    for (_, one), (_, other) in zip(whole, parts, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
        assert one.top_logprobs == other.top_logprobs
