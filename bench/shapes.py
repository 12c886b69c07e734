"""Memory and time per step of full-sized models with random weights: whether they load and serve, and how fast.

    python bench/shapes.py --shape llada-8b --folder DIR --device cuda --out bench/results/llada-8b.json

Writes a checkpoint of the shape in its published layout to DIR (16 GB for the 7 and 8 B shapes; kept and used again),
loads it as `steerserve serve` does, with its self-test, and denoises batches of rows of 128 new tokens in 64 steps
behind a prompt of 64, without steering and with a push on every row. What the tokens are means nothing; time and memory
do not depend on it. Prints a table and ends with JSON. The shape `small` is there to try the script out.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from steerserve.config import EngineConfig, ModelConfig
from steerserve.engine.api.events import Done, Event
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.models.families import family_of
from steerserve.runtime.load import load_runtime

PROMPT, TOKENS, STEPS, WARM = 64, 128, 64, 4
SHARD = 4 << 30

LLADA: dict[str, Any] = {
    "model_type": "llada", "block_type": "llama", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
    "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": 126336,
    "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
DREAM: dict[str, Any] = {
    "model_type": "Dream", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 131072, "mask_token_id": 151666,
    "eos_token_id": 151643, "pad_token_id": 151643, "tie_word_embeddings": False, "use_mrope": False,
}  # fmt: skip
MDLM: dict[str, Any] = {
    "model_type": "mdlm", "vocab_size": 50258, "model_length": 1024, "hidden_dim": 768, "cond_dim": 128,
    "n_blocks": 12, "n_heads": 12, "dropout": 0.1, "time_conditioning": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": LLADA,
    "dream-7b": DREAM,
    "mdlm-owt": MDLM,
    "small": LLADA | {"d_model": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 512},
}


def write(folder: Path, config: dict[str, Any], device: str) -> None:
    """A checkpoint of random bfloat16 weights, sharded, and a tokenizer of its special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = family_of(folder, config).from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    parts = 0

    def close() -> None:
        nonlocal shard, parts
        parts += 1
        save_file(shard, folder / f"model-{parts:05}.safetensors")
        index.update(dict.fromkeys(shard, f"model-{parts:05}.safetensors"))
        shard = {}

    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
        shard[name] = (values + 1 if tensor.ndim == 1 and name.endswith("weight") else values).cpu()
        if sum(values.numel() * 2 for values in shard.values()) > SHARD:
            close()
    close()
    facts = model.facts
    special = {"[MASK]": facts.mask_id, "[EOS]": facts.eos_id, "[UNK]": 0}
    Tokenizer(models.WordLevel(special, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    # Last: a folder that has it is whole.
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rows(engine: DiffusionEngine, count: int, steered: bool) -> list[GenerationParams]:
    """Rows that differ in seed and, steered, in direction."""
    facts = engine.model.facts
    found = []
    for row in range(count):
        direction = torch.randn(facts.hidden_size, generator=torch.Generator().manual_seed(row))
        push = Intervention(
            vector=VectorRef(facts.num_layers // 2, tuple(direction.tolist())), strength=1.0, unit="raw"
        )
        found.append(
            GenerationParams(
                prompt=tuple(range(1, PROMPT + 1)),
                max_tokens=TOKENS,
                steps=STEPS,
                seed=row,
                temperature=0.0,
                order="confidence",
                transfer="linear",
                ignore_eos=True,
                interventions=(push,) if steered else (),
            )
        )
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(engine: DiffusionEngine, count: int, steered: bool, steps: int) -> dict[str, Any]:
    """Seconds of each step of one batch after the first few, and the most memory the device took."""
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    requests = [engine.admit(params) for params in rows(engine, count, steered)]
    engine.add(requests)
    times: list[float] = []
    events: list[Event] = []
    while len(times) < steps and not any(isinstance(event, Done) for event in events):
        wait(engine.device)
        began = time.perf_counter()
        events = engine.step()
        wait(engine.device)
        times.append(time.perf_counter() - began)
    for request in requests:
        engine.abort(request.id)
    engine.step()
    warm = times[WARM:] or times
    cuda = engine.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": count,
        "steered": steered,
        "steps": len(warm),
        "step_ms": {
            "median": 1e3 * statistics.median(warm),
            "min": 1e3 * min(warm),
            "max": 1e3 * max(warm),
        },
        "tokens_per_second": count * TOKENS / STEPS / statistics.median(warm),
        "peak_gib": peak / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps to time of each batch (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (arguments.folder / "config.json").is_file():
        write(arguments.folder, SHAPES[arguments.shape], "cuda" if cuda else "cpu")
    began = time.perf_counter()
    config = EngineConfig(max_rows=max(arguments.rows))
    placed = ModelConfig(dtype=arguments.dtype, device=arguments.device)
    engine = load_runtime(arguments.folder, None, None, config, placed, print).engine
    loaded = time.perf_counter() - began
    figures = [measure(engine, count, on, arguments.steps) for count in arguments.rows for on in (False, True)]
    result = {
        "shape": arguments.shape,
        "machine": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "load_seconds": loaded,
        "figures": figures,
    }
    print("| rows | steered | ms a step, median (range) | tokens a second | peak GiB |\n|---|---|---|---|---|")
    for one in figures:
        ms = one["step_ms"]
        print(
            f"| {one['rows']} | {'yes' if one['steered'] else 'no'} | {ms['median']:.1f} ({ms['min']:.1f} to "
            f"{ms['max']:.1f}) | {one['tokens_per_second']:.1f} | {one['peak_gib']:.1f} |"
        )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
