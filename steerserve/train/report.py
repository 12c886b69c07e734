"""Figures of a trained model for its card: held-out NELBO by set, and samples that nobody chose."""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.events import Done, Result
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.models.base import DiffusionLM
from steerserve.train import corpus
from steerserve.train.dlm import nelbo

TEXTS = 128
"""Held-out texts of each set that are scored, from the start of the text to the end of the context."""
TIMES = 8
"""Noise levels each text is scored at, spread evenly over (0, 1] within the text and over the texts."""


@torch.inference_mode()
def held_out(model: DiffusionLM, tokenizer: Tokenizer, data: Path, context: int) -> dict[str, dict[str, float]]:
    """By set: NELBO in nats per token with its standard error over texts, bits per byte of the lower-case text."""
    bos = [] if model.facts.bos_id is None else [model.facts.bos_id]
    scores = {}
    for stem, path in corpus.files(data).items():
        texts = [row["text"] for row in corpus.rows(path) if corpus.split_of(row["text"]) == "valid"][:TEXTS]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids[: context - len(bos)] for text in texts]
        ids = [one for one in ids if one]
        generator = torch.Generator().manual_seed(0)
        losses = torch.zeros(len(ids))
        for start in range(0, len(ids), 16):
            part = ids[start : start + 16]
            width = max(len(one) for one in part) + len(bos)
            rows = [bos + one + [0] * (width - len(one) - len(bos)) for one in part]
            lengths = torch.tensor([len(one) + len(bos) for one in part])
            for level in range(TIMES):
                shift = (torch.arange(len(part)) + start + 0.5) / len(ids)
                losses[start : start + 16] += nelbo(
                    model, torch.tensor(rows), lengths, (level + shift) / TIMES, generator
                )
        per_text = losses / TIMES
        tokens = torch.tensor([float(len(one)) for one in ids])
        size = sum(len(tokenizer.decode(one).encode()) for one in ids)
        mean = float(per_text.sum() / tokens.sum())
        # Of a ratio of sums over texts, by linearisation.
        error = float((per_text - mean * tokens).std() * math.sqrt(len(ids)) / tokens.sum())
        scores[stem] = {
            "nelbo_nats_per_token": round(mean, 4),
            "standard_error": round(error, 4),
            "bits_per_byte": round(float(per_text.sum()) / math.log(2) / size, 4),
            "texts": len(ids),
            "tokens": int(tokens.sum()),
        }
    return scores


def samples(model: DiffusionLM, tokenizer: Tokenizer, prompts: list[str], **settings: Any) -> list[dict[str, str]]:
    """One sample a prompt, seeds 0, 1, 2, ...: unselected; `settings` are fields of GenerationParams."""
    engine = DiffusionEngine(model, tokenizer, Catalogue(model.facts, {}, {}, {}), EngineConfig(max_queue=len(prompts)))
    requests = [engine.admit(GenerationParams(prompt=p, seed=seed, **settings)) for seed, p in enumerate(prompts)]
    engine.add(requests)
    done: dict[str, Result] = {}
    while len(done) < len(requests):
        done |= {event.request_id: event.result for event in engine.step() if isinstance(event, Done)}
    return [{"prompt": p, "text": done[r.id].text} for p, r in zip(prompts, requests, strict=True)]
