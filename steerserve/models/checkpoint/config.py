"""The JSON files of a model folder: its configuration, and the special tokens of its tokenizer."""

import json
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.pointers import refuse_pointer


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
    if (folder / "tokenizer.json").is_file():
        raw = read_object(folder / "tokenizer.json")
        known = {one["content"]: one["id"] for one in raw.get("added_tokens") or ()}
        vocabulary = (raw.get("model") or {}).get("vocab")
        known = (vocabulary if isinstance(vocabulary, dict) else {}) | known
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        known = {piece: index for index, piece in enumerate(lines)}
    else:
        return {}
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("mask", "sep", "cls", "pad", "unk")}
    if (folder / "tokenizer_config.json").is_file():
        said = read_object(folder / "tokenizer_config.json")
        for role in roles:
            token = said.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            roles[role] = token if isinstance(token, str) else roles[role]
    return {f"{role}_id": known[token] for role, token in roles.items() if token in known}
