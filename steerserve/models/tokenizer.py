"""The tokenizer of a folder: `tokenizer.json`, or the vocabulary and merges that byte-level BPE was published with.

Tokenizers that come as code (Dream's) are byte-level BPE like GPT-2's or Qwen2's with other tokens added: the files say
all there is to know, and the code is never run.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from steerserve.errors import ArtifactError
from steerserve.models.folder import read_object

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
GPT2, QWEN2 = "gpt2", "qwen2"
CLASSES: Mapping[str, str] = {
    "GPT2Tokenizer": GPT2,
    "GPT2TokenizerFast": GPT2,
    "Qwen2Tokenizer": QWEN2,
    "Qwen2TokenizerFast": QWEN2,
    "DreamTokenizer": QWEN2,
}
"""How the tokenizers that a `tokenizer_config.json` may name split text before merging."""
FAMILIES: Mapping[str, str] = {"dream": QWEN2, "mdlm": GPT2, "sedd": GPT2}
"""The same by model family, where the folder does not say."""

QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What Qwen2 merges within: contractions, words, single digits, punctuation, line ends, blanks."""
END_OF_TEXT = "<|endoftext|>"
"""Special in both vocabularies, whether or not a file says so."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(folder: Path, family: str | None = None) -> Tokenizer:
    """The tokenizer in a folder; `family` tells how BPE splits text where the folder does not.

    Raises ArtifactError where there is none, or it cannot be read.
    """
    if not has_tokenizer(folder):
        raise ArtifactError(
            f"{folder} has no {TOKENIZER}, nor {VOCABULARY} and {MERGES}; "
            "--tokenizer DIR names a folder that has them (GPT-2's, for MDLM and SEDD)"
        )
    tokenizer = _from_json(folder) if (folder / TOKENIZER).is_file() else _from_merges(folder, family)
    # What a file says of truncation would cut prompts without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that spells out what only looks like a special token: for texts that somebody, or a model, wrote."""
    made: Tokenizer = copy.deepcopy(tokenizer)
    made.encode_special_tokens = True
    return made


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return (folder / TOKENIZER).is_file() or all((folder / name).is_file() for name in (VOCABULARY, MERGES))


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of a folder's special tokens by role (`bos_token`, ...), as chat templates know them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, token in _object(folder / name).items():
            if role in ROLES and (text := _content(token)) is not None:
                found[role] = text
    return found


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The parsed `tokenizer_config.json`; empty where there is none."""
    return _object(folder / "tokenizer_config.json")


def _from_json(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ArtifactError(f"{path} is not a tokenizer: {error}") from error
    for index, token in sorted(_added(folder).items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ArtifactError(
                f"{folder}: token {token.content!r} is {tokenizer.token_to_id(token.content)} in tokenizer.json, "
                f"{index} in the files beside it"
            )
    return tokenizer


def _from_merges(folder: Path, family: str | None) -> Tokenizer:
    vocabulary, merges = folder / VOCABULARY, folder / MERGES
    kind = _kind(folder, family)
    ids = read_object(vocabulary)
    if any(type(index) is not int for index in ids.values()):
        raise ArtifactError(f"{vocabulary} is no BPE vocabulary: an id is no whole number")
    added = _added(folder)
    # Added tokens stand in the vocabulary under their own ids; no merge leads to them.
    ids |= {token.content: index for index, token in added.items()}
    try:
        pairs = [(left, right) for left, right in (line.split(" ") for line in _merge_lines(merges))]
        tokenizer = Tokenizer(BPE(vocab=ids, merges=pairs, fuse_unk=False))
    except Exception as error:  # tokenizers raises bare Exception for every kind of broken file
        raise ArtifactError(f"{vocabulary} and merges.txt are no BPE vocabulary: {error}") from error
    if kind == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {*special_tokens(folder).values(), END_OF_TEXT} & ids.keys()
    known = {token.content: token for token in added.values()}
    special = [AddedToken(text, special=True, normalized=False) for text in sorted(named - known.keys())]
    tokenizer.add_special_tokens(special + [token for token in known.values() if token.special])
    tokenizer.add_tokens([token for token in known.values() if not token.special])
    return tokenizer


def _kind(folder: Path, family: str | None) -> str:
    """How this folder's BPE splits text: what its tokenizer class says, else its family."""
    named = tokenizer_config(folder).get("tokenizer_class")
    if isinstance(named, str):
        if named not in CLASSES:
            raise ArtifactError(
                f"{folder}: tokenizer_class is {named!r}; without a tokenizer.json, {', '.join(CLASSES)} can be read"
            )
        return CLASSES[named]
    return FAMILIES.get(family or "", GPT2)


def _merge_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def _added(folder: Path) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary by id: `added_tokens_decoder` of the config, which knows more of each, else
    `added_tokens.json`."""
    listed = tokenizer_config(folder).get("added_tokens_decoder")
    try:
        if listed:
            return {int(index): _token(facts) for index, facts in listed.items()}
        texts = _object(folder / "added_tokens.json")
        named = set(special_tokens(folder).values()) | set(_additional(folder))
        return {
            int(index): AddedToken(text, special=text in named, normalized=text not in named)
            for text, index in texts.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: its added tokens cannot be read: {type(error).__name__}: {error}") from error


def _token(facts: Mapping[str, Any]) -> AddedToken:
    special = bool(facts.get("special", False))
    return AddedToken(
        str(facts["content"]),
        special=special,
        lstrip=bool(facts.get("lstrip", False)),
        rstrip=bool(facts.get("rstrip", False)),
        single_word=bool(facts.get("single_word", False)),
        normalized=bool(facts.get("normalized", not special)),
    )


def _additional(folder: Path) -> list[str]:
    """Special tokens without a role."""
    listed = [
        token
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        for token in _object(folder / name).get("additional_special_tokens") or []
    ]
    return [text for text in map(_content, listed) if text is not None]


def _content(token: object) -> str | None:
    """The text of a token, which a file gives as it is or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
