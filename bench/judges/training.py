"""Train the judge into a folder, resuming from it."""

import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.judges.model import JudgeConfig, LanguageModel
from bench.judges.texts import Packed, judges_texts, train_tokenizer
from steerserve.errors import ArtifactError

SAVE_SECONDS = 120.0
HELD_OUT_BATCHES = 24


@dataclass(frozen=True)
class JudgeRecipe:
    """How long and how fast to train."""

    tokens: int = 3_000_000
    rows: int = 16
    """Rows of one optimiser step."""
    learning_rate: float = 1.5e-3
    warmup: float = 0.04
    """Share of the tokens over which the rate rises from zero."""
    decay: float = 0.5
    """Share of the tokens, the last, over which the rate falls to zero."""
    weight_decay: float = 0.1
    seed: int = 0


def train(data: Path, out: Path, config: JudgeConfig, recipe: JudgeRecipe) -> dict[str, Any]:
    """Train into `out` and return what its `judge.json` holds; raises ArtifactError where `out` has another recipe."""
    out.mkdir(parents=True, exist_ok=True)
    texts = judges_texts(data, held_out=False)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(chain.from_iterable(texts.values()), config.vocabulary).save(str(out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    packed = Packed(tokenizer, texts, config.context)
    held_out = Packed(tokenizer, judges_texts(data, held_out=True), config.context)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    asked = {"config": asdict(config), "recipe": asdict(recipe)}
    step = _resume(out, asked, model, optimizer)
    each = recipe.rows * config.context
    steps = math.ceil(recipe.tokens / each)
    saved, average = time.monotonic(), math.nan
    facts: dict[str, Any] = {}
    with tqdm(total=steps, initial=step, unit="step", mininterval=10) as bar:
        while step < steps or not facts:
            if step < steps:
                for group in optimizer.param_groups:
                    group["lr"] = rate(recipe, (step + 1) / steps)
                loss = model.losses(packed.rows(recipe.seed, step, recipe.rows)).mean()
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                current = float(loss.detach())
                average = current if math.isnan(average) else 0.98 * average + 0.02 * current
                bar.update(1)
                bar.set_postfix(loss=f"{average:.3f}", refresh=False)
            if step >= steps or time.monotonic() - saved > SAVE_SECONDS:
                scores = measure(model, held_out, recipe.rows)
                facts = asked | {"step": step, "tokens": step * each, **scores}
                _save(out, facts, model, optimizer)
                bar.write(json.dumps({"step": step, "train": round(average, 4), **scores}))
                saved = time.monotonic()
                facts = facts if step >= steps else {}
    return facts


def rate(recipe: JudgeRecipe, share: float) -> float:
    """Learning rate at a share of the training: linear rise, flat, linear fall."""
    return recipe.learning_rate * max(0.0, min(1.0, share / recipe.warmup, (1.0 - share) / recipe.decay))


@torch.inference_mode()
def measure(model: LanguageModel, held_out: Packed, rows: int) -> dict[str, float]:
    """Held-out loss of the training mix; the same rows at every call."""
    batches = [held_out.rows(10_000, index, rows) for index in range(HELD_OUT_BATCHES)]
    losses = torch.cat([model.losses(batch).flatten() for batch in batches])
    starts = torch.cat([batch[:, 1:].eq(held_out.start).flatten() for batch in batches])
    return {
        "held_out_nats_per_token": round(float(losses[~starts].mean()), 4),
        "held_out_tokens": int((~starts).sum()),
    }


def _resume(out: Path, asked: dict[str, Any], model: LanguageModel, optimizer: torch.optim.AdamW) -> int:
    if not (out / "judge.json").exists():
        return 0
    facts = json.loads((out / "judge.json").read_text(encoding="utf-8"))
    if other := {name: facts.get(name) for name in asked if facts.get(name) != asked[name]}:
        raise ArtifactError(f"{out} holds a judge of {other}, not of {asked}; choose another folder")
    model.load_state_dict(load_file(out / "judge.safetensors"))
    if (out / "optimizer.safetensors").exists():
        saved = load_file(out / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: saved[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(facts["step"])


def _save(out: Path, facts: dict[str, Any], model: LanguageModel, optimizer: torch.optim.AdamW) -> None:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "judge.safetensors")
    moments = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    if moments:
        save_file(moments, out / "optimizer.safetensors")
    (out / "judge.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
