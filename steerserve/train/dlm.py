"""Train a masked diffusion language model: the NELBO of MDLM (arXiv 2406.07524, equation 8; LLaDA, arXiv 2502.09992).

For a canvas of n tokens and t ~ U(0, 1], k = ceil(t n) tokens are masked and the loss is the cross-entropy at the
masked positions weighted by n / k, the 1/t of the masked count; its mean over t is the NELBO in nats per token. The
times of a round are spread evenly over (0, 1] (low discrepancy), so that every round sees every mask ratio.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from steerserve.models.base import DiffusionLM
from steerserve.train import corpus

SAVE_SECONDS = 300.0
"""Time between two saves; each also measures the held-out loss."""


@dataclass(frozen=True)
class DlmRecipe:
    """How long and how fast to train."""

    tokens: int = 12_000_000
    """Training tokens in all, padding not counted."""
    batch_tokens: int = 3072
    """Tokens of one optimiser step, padding counted."""
    learning_rate: float = 5e-4
    warmup: float = 0.03
    """Share of the tokens over which the rate rises from zero."""
    decay: float = 0.35
    """Share of the tokens, the last, over which the rate falls to zero."""
    weight_decay: float = 0.01
    context: int = 128
    seed: int = 0


class Documents:
    """Tokenised texts of each set, and seeded crops of them in the shares of `corpus.MIX`."""

    def __init__(
        self, data: Path, tokenizer: Tokenizer, held_out: bool, context: int, bos_id: int, eos_id: int
    ) -> None:
        self.context, self.bos_id, self.eos_id = context, bos_id, eos_id
        self.sets: dict[str, list[np.ndarray]] = {}
        self.bytes: dict[str, list[int]] = {}
        for stem, path in corpus.files(data).items():
            texts = [row["text"] for row in corpus.rows(path)]
            texts = [text for text in texts if (corpus.split_of(text) == "valid") == held_out]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            self.sets[stem] = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        weights = np.array([corpus.MIX.get(stem, corpus.DEFAULT_SHARE) for stem in self.sets])
        lengths = np.array([np.mean([min(len(d), context) for d in docs]) for docs in self.sets.values()])
        self.odds = weights / lengths / (weights / lengths).sum()

    def crop(self, document: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[CLS], then a text that ends in [SEP]s, or one cut so that it fills its canvas."""
        room = self.context - 1
        if len(document) > room:
            size = int(random.integers(room // 3, room + 1))
            start = int(random.integers(0, len(document) - size + 1)) if random.random() < 0.7 else 0
            document = document[start : start + size]
        if random.random() < 0.5:
            tail = int(random.integers(1, 25))
            document = np.concatenate([document, np.full(tail, self.eos_id, dtype=np.int32)])[:room]
        return np.concatenate([np.array([self.bos_id], dtype=np.int32), document])

    def batches(self, seed: int, start: int, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless (tokens [rows, width], lengths [rows], times [rows]); a round of 384 crops is one seed."""
        names = list(self.sets)
        for index in range(start, 2**31):
            random = np.random.default_rng([seed, index])
            picks = random.choice(len(names), size=384, p=self.odds)
            crops = []
            for pick in picks:
                documents = self.sets[names[pick]]
                crops.append(self.crop(documents[int(random.integers(len(documents)))], random))
            times = random.permutation((np.arange(len(crops)) + random.random()) / len(crops))
            order = np.argsort([len(c) for c in crops], kind="stable")
            groups: list[list[int]] = [[]]
            for item in order:
                if (len(groups[-1]) + 1) * len(crops[item]) > batch_tokens:
                    groups.append([])
                groups[-1].append(int(item))
            for which in random.permutation(len(groups)):
                group = groups[which]
                width = max(len(crops[item]) for item in group)
                tokens = np.zeros((len(group), width), dtype=np.int64)
                for row, item in enumerate(group):
                    tokens[row, : len(crops[item])] = crops[item]
                yield (
                    torch.from_numpy(tokens),
                    torch.tensor([len(crops[item]) for item in group]),
                    torch.tensor([times[item] for item in group], dtype=torch.float32),
                )


def draw_masks(lengths: Tensor, times: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions to mask [rows, width] and their weight n / k [rows]; the first token (BOS) is never masked."""
    draws = torch.rand(len(lengths), width, generator=generator)
    draws[:, 0] = 2.0
    draws = draws.masked_fill(torch.arange(width) >= lengths[:, None], 2.0)
    counts = torch.ceil(times * (lengths - 1)).clamp(min=1)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    return ranks < counts[:, None], (lengths - 1) / counts


def nelbo(model: DiffusionLM, tokens: Tensor, lengths: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """NELBO in nats summed over the tokens of each row [rows]."""
    masked, weight = draw_masks(lengths, times, tokens.shape[1], generator)
    hidden = model(tokens.masked_fill(masked, model.facts.mask_id), lengths)
    losses = F.cross_entropy(model.head(hidden[masked]), tokens[masked], reduction="none")
    rows = masked.nonzero()[:, 0]
    return torch.zeros(len(tokens)).index_add(0, rows, losses * weight[rows])


@torch.no_grad()
def evaluate(model: DiffusionLM, documents: Documents, rounds: int) -> dict[str, float]:
    """Held-out NELBO in nats per token, whole mix; the same crops, times and masks at every call."""
    generator = torch.Generator().manual_seed(1)
    total, count, seen = 0.0, 0, 0
    for tokens, lengths, times in documents.batches(seed=10_000, start=0, batch_tokens=8192):
        total += float(nelbo(model, tokens, lengths, times, generator).sum())
        count += int((lengths - 1).sum())
        seen += len(tokens)
        if seen >= 384 * rounds:
            break
    return {"nelbo_nats_per_token": total / count, "tokens": count}


def rate(recipe: DlmRecipe, seen: int) -> float:
    """Learning rate after `seen` tokens: linear rise, flat, linear fall."""
    share = seen / recipe.tokens
    return recipe.learning_rate * max(0.0, min(1.0, share / recipe.warmup, (1.0 - share) / recipe.decay))


def train(model: DiffusionLM, data: Path, tokenizer: Tokenizer, out: Path, recipe: DlmRecipe) -> dict[str, float]:
    """Train into `out` and resume from it; writes weights, optimiser state and a log of losses as it goes."""
    out.mkdir(parents=True, exist_ok=True)
    bos = model.facts.bos_id
    assert bos is not None, "the recipe trains on canvases that begin with a BOS token"
    held_out = Documents(data, tokenizer, True, recipe.context, bos, model.facts.eos_id)
    documents = Documents(data, tokenizer, False, recipe.context, bos, model.facts.eos_id)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    state = {"seen": 0, "steps": 0, "round": 0}
    if (out / "training.json").exists():
        state = json.loads((out / "training.json").read_text())["state"]
        model.load_state_dict(load_file(out / "weights.safetensors"))
        saved = load_file(out / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: saved[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}

    def save(scores: dict[str, float]) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "weights.safetensors")
        moments = {
            f"{name}/{key}": value
            for name, parameter in zip(names, model.parameters(), strict=True)
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, out / "optimizer.safetensors")
        (out / "training.json").write_text(json.dumps({"state": state, "recipe": asdict(recipe), **scores}, indent=2))

    started, since_save, average = time.monotonic(), time.monotonic(), math.nan
    scores: dict[str, float] = {}
    bar = tqdm(total=recipe.tokens, initial=state["seen"], unit="tok", unit_scale=True, mininterval=20)
    while state["seen"] < recipe.tokens:
        # A stop inside a round is resumed at the next one: rounds are short, and no batch is seen twice.
        state["round"] += 1
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state["round"])
        left = 384
        for tokens, lengths, times in documents.batches(recipe.seed, state["round"], recipe.batch_tokens):
            for group in optimizer.param_groups:
                group["lr"] = rate(recipe, state["seen"] + 1)
            loss = nelbo(model, tokens, lengths, times, generator).sum() / (lengths - 1).sum()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            current = float(loss.detach())
            average = current if math.isnan(average) else 0.98 * average + 0.02 * current
            state["seen"] += int((lengths - 1).sum())
            state["steps"] += 1
            bar.update(int((lengths - 1).sum()))
            left -= len(tokens)
            if left <= 0:
                break
        bar.set_postfix(loss=f"{average:.3f}", steps=state["steps"])
        if time.monotonic() - since_save > SAVE_SECONDS or state["seen"] >= recipe.tokens:
            scores = evaluate(model, held_out, rounds=2)
            with open(out / "losses.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({**state, **scores, "train": average, "s": time.monotonic() - started}) + "\n")
            save(scores)
            since_save = time.monotonic()
    bar.close()
    return scores
