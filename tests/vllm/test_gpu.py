"""What only GPUs can show: Model Runner V2 and its channel of steering, and ranks that talk through NCCL."""

from pathlib import Path

import pytest
import torch

from steerserve.engine.vllm.engine import first_logits
from steerserve.runtime.self_test import check_steering
from tests import tiny
from tests.engine.alike import assert_alike
from tests.engine.mixed import mixed
from tests.vllm import made

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("second", ["1", "0"], ids=["runner V2", "runner V1"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_generations_are_those_of_the_torch_engine(
    family: str, ranks: int, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    model, saes = made.write_model(tmp_path / "model", family), made.write_saes(tmp_path / "saes")
    engine = made.vllm_engine(model, saes, ranks)
    try:
        check_steering(engine, first_logits)
        rows = mixed(made.HIDDEN, 10.0)
        expected = tiny.run(made.torch_engine(model, saes), *rows)
        for (_, one), (_, other) in zip(tiny.run(engine, *rows), expected, strict=True):
            assert_alike(one, other)
    finally:
        engine.close()
