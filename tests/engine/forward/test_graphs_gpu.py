"""What only a GPU can show: that forwards are captured, and that their replays say what plain forwards do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import TorchEngine
from steerserve.engine.forward.graphs.graphed import GraphedLM
from steerserve.engine.forward.graphs.recorder import CudaRecorder
from steerserve.runtime.self_test import check_steering
from tests import tiny
from tests.engine.alike import assert_alike
from tests.engine.forward.test_graphs import EVERY_FAMILY, FAMILIES, adding, canvas, plan_of, push, sigmas

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@EVERY_FAMILY
def test_rows_say_the_same_as_by_plain_forwards(family: str) -> None:
    model = FAMILIES[family]().to("cuda")
    graphed = GraphedLM(model, CudaRecorder(torch.device("cuda")))
    catalogue = Catalogue(model.facts, {}, {}, {}, model.defaults)
    plain, served = (
        TorchEngine(one, tiny.tokenizer(), catalogue, EngineConfig(cuda_graphs=one is graphed))
        for one in (model, graphed)
    )
    check_steering(served)
    ratios: dict[str, Any] = {"transfer": "euler", "order": "random"} if family == "sedd" else {}
    asked = adding(12, **ratios)
    expected = tiny.run(plain, *asked)
    for _ in range(2):
        for (_, one), (_, other) in zip(tiny.run(served, *asked), expected, strict=True):
            assert_alike(one, other)
    assert graphed.replays > 10


@EVERY_FAMILY
@torch.inference_mode()
def test_states_are_those_of_the_plain_forward_whatever_was_replayed_before(family: str) -> None:
    model = FAMILIES[family]().to("cuda")
    graphed = GraphedLM(model, CudaRecorder(torch.device("cuda")))
    for seed, (count, length) in enumerate([(1, 20), (3, 44), (8, 60), (1, 20), (2, 44), (8, 60)]):
        tokens, sigma = canvas(count, length, seed).cuda(), sigmas(model, count)
        sigma = None if sigma is None else sigma.cuda()
        lengths = torch.tensor([length - row for row in range(count)], device="cuda")
        inside = torch.arange(length, device="cuda") < lengths[:, None]
        pushes = [[push(row % 3, seed + row)] if row % 2 == seed % 2 else [] for row in range(count)]
        said = [run(tokens, lengths, plan_of(pushes, length, device="cuda"), sigma)[inside] for run in (graphed, model)]
        torch.testing.assert_close(said[0], said[1], rtol=1e-3, atol=1e-3)
    assert graphed.replays == 6


def test_work_that_waits_for_the_device_is_not_captured() -> None:
    value = torch.ones((), device="cuda")

    def waiting() -> None:
        value.add_(float(value.item()))

    recorder: Callable[[Callable[[], None]], Callable[[], None]] = CudaRecorder(torch.device("cuda"))
    with pytest.raises(RuntimeError):
        recorder(waiting)
