"""vLLM's engine arguments: those that a denoising step fixes, and those that whoever starts the server may add."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steerserve.config import SaeConfig
from steerserve.engine.vllm.checkpoint import facts_to_json
from steerserve.errors import ArtifactError
from steerserve.models import ModelFacts

WORKER: Final = "steerserve.engine.vllm.worker.steering_worker.SteeringWorker"
KV_CACHE_BYTES: Final = 1 << 26
"""What vLLM sets aside for keys and values on a CPU, where it asks: a model that attends both ways keeps none."""

OURS: Final[Mapping[str, str]] = {
    "model": "--model",
    "tokenizer": "--tokenizer",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "max_num_seqs": "--max-rows",
    "max_model_len": "--max-canvas",
    "served_model_name": "--served-name",
    "revision": "--revision",
}
"""Options of vLLM's that have a flag of their own here."""
FIXED: Final[Mapping[str, str]] = {
    "runner": "a denoising step is a pooling request",
    "convert": "the model pools by itself",
    "pooler_config": "the model pools by itself",
    "hf_config_path": "the model's config is translated",
    "hf_overrides": "the model's config is translated",
    "skip_tokenizer_init": "texts are tokenised before they reach vLLM",
    "worker_extension_cls": "it lets the model know its batch",
    "additional_config": "it tells the workers of the model and its SAEs",
    "enforce_eager": "a replayed graph would leave the steering out",
    "enable_chunked_prefill": "every position of a canvas looks at every other",
    "enable_prefix_caching": "every position of a canvas looks at every other",
    "pipeline_parallel_size": "a step's receipts are made on one stage",
    "data_parallel_size": "run one server for each copy, behind a load balancer",
    "prefill_context_parallel_size": "a step needs whole canvases on every rank",
    "decode_context_parallel_size": "a step needs whole canvases on every rank",
    "enable_lora": "the model takes no adapters",
    "speculative_config": "nothing is decoded",
    "disable_log_stats": "the server has metrics of its own",
}
"""Options of vLLM's that this engine sets itself or cannot do with, and why."""


@dataclass(frozen=True)
class Sources:
    """What the workers read from disk by themselves: on every node of several, at the same place."""

    model: Path
    saes: Path | None
    sae_config: SaeConfig

    def told(self) -> dict[str, Any] | None:
        """Where the SAEs are and which of them are loaded, as JSON."""
        if self.saes is None:
            return None
        layers = self.sae_config.sae_layers
        return {
            "folder": str(self.saes.resolve()),
            "layers": None if layers is None else list(layers),
            "k": self.sae_config.sae_k,
        }


def engine_arguments(
    sources: Sources, facts: ModelFacts, dtype: str, rows: int, canvas: int, ranks: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """All of vLLM's arguments; rows of canvases of at most so many tokens make one step, on so many ranks."""
    longest = min(facts.max_length, canvas)
    return {
        "max_num_batched_tokens": max(rows * min(longest, 512), longest),
        **extra,
        "model": str(sources.model.resolve()),
        "dtype": dtype,
        "tensor_parallel_size": ranks,
        "max_num_seqs": rows,
        "max_model_len": longest,
        "runner": "pooling",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "worker_extension_cls": WORKER,
        "additional_config": {"steerserve": {"facts": facts_to_json(facts), "saes": sources.told()}},
        "disable_log_stats": True,
    }


def core_shares(ranks: int, cores: Sequence[int]) -> str:
    """The cores of each rank as `VLLM_CPU_OMP_THREADS_BIND` has them: equal shares, or one core for several ranks
    where there are fewer cores than ranks."""
    size = max(1, len(cores) // ranks)
    starts = [rank * size % len(cores) for rank in range(ranks)]
    return "|".join(",".join(map(str, cores[start : start + size])) for start in starts)


def parse_extra(given: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """`key=value` pairs as arguments, each value JSON or else a text; known are the names that vLLM has.

    Raises ArtifactError for one that is no pair, not known, given twice, or not for this engine to change.
    """
    names = set(known)
    found: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        name = key.strip().removeprefix("--").replace("-", "_")
        if not equals or not name:
            raise ArtifactError(f"--vllm-arg takes key=value, got {pair!r}")
        if name in OURS:
            raise ArtifactError(f"--vllm-arg {name}: use {OURS[name]} instead")
        if name in FIXED:
            raise ArtifactError(f"--vllm-arg {name}: the engine sets it itself: {FIXED[name]}")
        if name not in names:
            raise ArtifactError(f"--vllm-arg {name}: this vLLM has no such option; it has {', '.join(sorted(names))}")
        if name in found:
            raise ArtifactError(f"--vllm-arg {name} is given twice")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
