"""A trained judge, and its loss of texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bench.judges.model import JudgeConfig, LanguageModel
from bench.judges.texts import encode, plain
from steerserve.errors import ArtifactError

ROWS = 64


@dataclass(frozen=True)
class Verdict:
    """How surprising a text is."""

    nats: float
    """Sum over its tokens."""
    bytes: int
    """Bytes of the text as it was read: the loss of a text is nats a byte, which no tokenizer has a say in."""


class QualityJudge:
    """A judge loaded from its folder."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, facts

    @torch.inference_mode()
    def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """The verdict on each text; of one longer than the context its beginning is read. An empty text is 0 of 1."""
        rows = encode(self.tokenizer, texts, self.model.config.context)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        nats = torch.zeros(len(rows), dtype=torch.float64)
        for first in range(0, len(order), ROWS):
            part = order[first : first + ROWS]
            width = max(2, max(len(rows[i]) for i in part))
            tokens = torch.zeros(len(part), width, dtype=torch.int64)
            for row, i in enumerate(part):
                tokens[row, : len(rows[i])] = torch.tensor(rows[i])
            lengths = torch.tensor([len(rows[i]) for i in part])
            inside = torch.arange(1, width) < lengths[:, None]
            # What is padded comes after the text, where nothing that counts can see it.
            nats[part] = (self.model.losses(tokens).double() * inside).sum(1)
        return [
            Verdict(float(n), _bytes(self.tokenizer, row, text)) for n, row, text in zip(nats, rows, texts, strict=True)
        ]


def load_judge(folder: Path) -> QualityJudge:
    """The judge that `python bench/judge.py --out FOLDER` wrote; raises ArtifactError."""
    try:
        facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        model = LanguageModel(JudgeConfig(**facts["config"]))
        model.load_state_dict(load_file(folder / "judge.safetensors"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        digest = hashlib.sha256((folder / "judge.safetensors").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{folder} holds no judge ({error}); make one with bench/judge.py") from error
    model.requires_grad_(False)
    model.eval()
    return QualityJudge(model, tokenizer, facts | {"sha256": digest})


def _bytes(tokenizer: Tokenizer, row: Sequence[int], text: str) -> int:
    whole = plain(text)
    # Only a text that was cut is decoded, since decoding is slow.
    read = whole if len(tokenizer.encode(whole).ids) == len(row) - 1 else tokenizer.decode(list(row[1:]))
    return max(1, len(read.encode()))
