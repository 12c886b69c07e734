"""The JSON files of a model folder: its configuration, and the special tokens of its tokenizer."""

import json
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.families.denoiser import Tokens
from steerserve.pointers import refuse_pointer

ROLES = ("mask", "sep", "cls", "pad", "unk", "bos", "eos")


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; raises ArtifactError for anything else."""
    refuse_pointer(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} is no model folder: it has no config.json")
    return read_object(path)


def token_ids(folder: Path) -> dict[str, int]:
    """The ids of a folder's special tokens by their role, as its tokenizer has them: `mask_token_id` and so on.

    A BERT's `config.json` leaves them to its tokenizer. Empty where the folder has no `tokenizer.json` or `vocab.txt`.
    """
    tokens = read_tokens(folder)
    usual = {role: f"[{role.upper()}]" for role in ("mask", "sep", "cls", "pad", "unk")}
    found = {f"{role}_token_id": tokens.vocabulary.get(text) for role, text in usual.items()} | dict(tokens.roles)
    return {
        name: index for name, index in found.items() if index is not None and name.removesuffix("_token_id") in usual
    }


def read_tokens(folder: Path) -> Tokens:
    """The vocabulary of a folder's tokenizer and the roles of its special tokens, as its files say; empty without."""
    roles: dict[str, str] = {}
    known: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        raw = read_object(folder / "tokenizer.json")
        vocabulary = (raw.get("model") or {}).get("vocab")
        known = vocabulary if isinstance(vocabulary, dict) else {}
        known = known | {one["content"]: one["id"] for one in raw.get("added_tokens") or ()}
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        known = {piece: index for index, piece in enumerate(lines)}
    elif (folder / "vocab.json").is_file():
        known = read_object(folder / "vocab.json")
    if known and (folder / "added_tokens.json").is_file():
        known = known | read_object(folder / "added_tokens.json")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said = read_object(folder / name) if (folder / name).is_file() else {}
        if known and name == "tokenizer_config.json":
            added = said.get("added_tokens_decoder") or {}
            known = known | {one["content"]: int(index) for index, one in added.items()}
        for role in ROLES:
            token = said.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
    found = {f"{role}_token_id": known[token] for role, token in roles.items() if token in known}
    return Tokens(found, known)
