"""The tokenizer of a folder, as `transformers` reads it, and the fast one inside it that the engine works with.

The engine takes the `tokenizers.Tokenizer` and not the class around it: its decoding changes no space (the class's
`clean_up_tokenization_spaces` does, so that the text of a prefix would be no prefix of the text), and it gives offsets
and the raw pieces of tokens. What `transformers` leaves open is settled here: see `open_tokenizer`.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from steerserve.errors import ArtifactError
from steerserve.models.checkpoint.config import read_object
from steerserve.models.pretrained import from_folder
from steerserve.pointers import refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
FILES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("vocab.json", "merges.txt"),
    "qwen2": ("vocab.json", "merges.txt"),
    "bert": ("vocab.txt",),
}
"""What tokenizers were published as before `tokenizer.json`, by their type in `transformers`."""
CLASSES: Mapping[str, str] = {
    "GPT2Tokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2",
    # Dream's comes as code, which is never run: it is Qwen2's with other tokens added, which the files name.
    "DreamTokenizer": "qwen2",
    "BertTokenizer": "bert",
}
"""The type by the class that a `tokenizer_config.json` names, with or without `Fast`."""
FAMILIES: Mapping[str, str] = {"bert": "bert", "dream": "qwen2"}
"""The type by model family, where the folder does not say; GPT-2's for every other."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER = "additional_special_tokens"
NORMALIZATION: Mapping[str, str] = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""BERT's normalization by the names of `tokenizer_config.json` and of `tokenizers`."""


def load_tokenizer(folder: Path, family: str | None = None) -> Tokenizer:
    """The tokenizer of a folder as the engine works with it; see `open_tokenizer`."""
    return open_tokenizer(folder, family)[0]


def open_tokenizer(folder: Path, family: str | None = None) -> "tuple[Tokenizer, PreTrainedTokenizerFast]":
    """The tokenizer of a folder as the engine works with it, and as `transformers` does, for its chat template.

    family tells the type of a tokenizer without `tokenizer.json` whose class no file names. Raises ArtifactError where
    there is none, it cannot be read, or two of its files contradict each other. Differs from `AutoTokenizer` in this:

    - a `tokenizer.json` is taken at its word. `AutoTokenizer` keeps its vocabulary and splits text by the class's own
      rules, which it may get from the model's type: the bundled model's would become BERT's and lose its spacing.
      Only what `tokenizer_config.json` says itself of prefix spaces and BERT's normalization changes it.
    - a token gets its id from a file or not at all; `transformers` gives those without one the next free id, which may
      be the mask's.
    - truncation and padding are off: they would cut prompts without a word.
    """
    for name in (TOKENIZER, *dict.fromkeys(chain(*FILES.values())), "chat_template.jinja"):
        refuse_pointer(folder / name)
    config = _object(folder / "tokenizer_config.json")
    kind = None if (folder / TOKENIZER).is_file() else _kind(folder, family, config)
    stated, special = _added(folder, config), _special(folder, config)
    options = {**special, "fix_mistral_regex": False}
    try:
        made = (
            from_folder("PreTrainedTokenizerFast", folder, **options)
            if kind is None
            else from_folder("AutoTokenizer", folder, tokenizer_type=kind, trust_remote_code=False, **options)
        )
    except Exception as error:  # transformers and tokenizers raise exceptions of every kind for broken files
        raise _broken(folder, kind, config, error) from error
    tokenizer = _without_new_ids(made.backend_tokenizer, folder, set(stated.values()))
    for index, text in stated.items():
        if tokenizer.token_to_id(text) != index:
            raise ArtifactError(
                f"{folder}: the id of token {text!r} is {tokenizer.token_to_id(text)} in its vocabulary, "
                f"{index} in the files beside it"
            )
    decoder = (config.get("added_tokens_decoder") or {}).values()
    called = {one["content"] for one in decoder if one.get("special")} | {str(one) for one in special.get(FURTHER, ())}
    _mark_special(tokenizer, {*made.all_special_tokens, *called})
    if kind is None:
        _follow(tokenizer, folder, config)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, made


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that spells out what only looks like a special token: for texts that somebody, or a model, wrote."""
    made: Tokenizer = copy.deepcopy(tokenizer)
    made.encode_special_tokens = True
    return made


def has_tokenizer(folder: Path) -> bool:
    """Tell if a folder holds the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in ((TOKENIZER,), *FILES.values()))


def _kind(folder: Path, family: str | None, config: Mapping[str, Any]) -> str:
    """The type of a tokenizer without `tokenizer.json`: what its class says, else its model's family."""
    if not has_tokenizer(folder):
        raise ArtifactError(
            f"{folder} has no {TOKENIZER}, nor vocab.json and merges.txt, nor vocab.txt; "
            "--tokenizer DIR names a folder that has them (GPT-2's, for MDLM and SEDD)"
        )
    named = config.get("tokenizer_class")
    kind = FAMILIES.get(family or "", "gpt2")
    if isinstance(named, str):
        if named.removesuffix("Fast") not in CLASSES:
            raise ArtifactError(
                f"{folder}: tokenizer_class is {named!r}; without a {TOKENIZER}, {', '.join(CLASSES)} can be read"
            )
        kind = CLASSES[named.removesuffix("Fast")]
    if missing := [name for name in FILES[kind] if not (folder / name).is_file()]:
        raise ArtifactError(f"{folder} has no {TOKENIZER}, and of a {kind} tokenizer no {' and no '.join(missing)}")
    return kind


def _broken(folder: Path, kind: str | None, config: Mapping[str, Any], error: Exception) -> ArtifactError:
    """What to say of a tokenizer that cannot be read: which file is no such thing, else what the library said of it."""
    files = (TOKENIZER,) if kind is None else FILES[kind]
    templates = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    try:
        for name in files:
            if name.endswith(".json"):
                read_object(folder / name)
        for path in templates:
            if path.is_file():
                path.read_text(encoding="utf-8")
    except ArtifactError as fault:
        return fault
    except (OSError, UnicodeDecodeError) as fault:
        return ArtifactError(f"{path} cannot be read: {fault}")
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    named = config.get("chat_template")
    if isinstance(named, list) and not all(
        isinstance(one, dict) and {"name", "template"} <= one.keys() for one in named
    ):
        return ArtifactError(f"{folder}: chat_template is no list of named templates: {reason}")
    what = f"{' and '.join(files)} {'is not a' if kind is None else f'are no {kind}'} tokenizer"
    return ArtifactError(f"{folder}: {what} that transformers can read: {reason}")


def _special(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that either of two files names: by role, and those without one.

    `transformers` leaves `special_tokens_map.json` unread where the other file lists `added_tokens_decoder`, and takes
    no token that `tokenizer_config.json` gives as an object.
    """
    beside = _object(folder / "special_tokens_map.json")
    roles = beside | {role: token for role, token in config.items() if token}
    found: dict[str, Any] = {role: _token(folder, roles[role]) for role in ROLES if roles.get(role)}
    listed = []
    for further in (beside.get(FURTHER) or [], config.get(FURTHER) or []):
        if not isinstance(further, list):
            raise ArtifactError(f"{folder}: {FURTHER} must be a list of tokens, got {further!r}")
        listed += further
    return found | ({FURTHER: [_token(folder, token) for token in listed]} if listed else {})


def _token(folder: Path, facts: Any) -> str | AddedToken:
    """A special token, which a file gives as it is or as an object."""
    if isinstance(facts, str):
        return facts
    if not isinstance(facts, Mapping) or not isinstance(facts.get("content"), str):
        raise ArtifactError(f"{folder}: a special token must be text or an object with its content, got {facts!r}")
    flags = {name: bool(facts[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in facts}
    return AddedToken(facts["content"], **{"normalized": False, **flags}, special=True)


def _added(folder: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Tokens that the files beside the vocabulary name, by id."""
    try:
        if listed := config.get("added_tokens_decoder"):
            return {int(index): str(facts["content"]) for index, facts in listed.items()}
        return {int(index): text for text, index in _object(folder / "added_tokens.json").items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: its added tokens cannot be read: {type(error).__name__}: {error}") from error


def _without_new_ids(tokenizer: Tokenizer, folder: Path, stated: set[str]) -> Tokenizer:
    """The tokenizer without the added tokens whose id no file states."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    new = {text for text in added - stated if tokenizer.model.token_to_id(text) is None}
    if new and (folder / TOKENIZER).is_file():
        new -= {token["content"] for token in read_object(folder / TOKENIZER).get("added_tokens") or ()}
    if not new:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in new]
    made = Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = tokenizer.encode_special_tokens
    return made


def _mark_special(tokenizer: Tokenizer, texts: set[str]) -> None:
    """Make the tokens that some file calls special special here too: they are no text, and none of it is split."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for text in sorted(texts):
        token = added.get(text) or AddedToken(text, normalized=False)
        if tokenizer.token_to_id(text) is not None and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


def _follow(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Split text as `tokenizer_config.json` says, where `tokenizer.json` says otherwise."""
    for name in ("add_prefix_space", *NORMALIZATION):
        wanted = config.get(name)
        if wanted is None:
            continue
        if not isinstance(wanted, bool):
            raise ArtifactError(f"{folder}/tokenizer_config.json: {name} must be true or false, got {wanted!r}")
        if name == "add_prefix_space":
            for part in _parts(tokenizer.pre_tokenizer, pre_tokenizers.Sequence):
                if isinstance(part, pre_tokenizers.ByteLevel):
                    part.add_prefix_space = wanted
        else:
            for part in _parts(tokenizer.normalizer, normalizers.Sequence):
                if isinstance(part, normalizers.BertNormalizer):
                    setattr(part, NORMALIZATION[name], wanted)


def _parts(step: Any, sequence: Any) -> Iterator[Any]:
    """The parts of a step that may be a sequence of others; a change to one changes the tokenizer."""
    if isinstance(step, sequence):
        for part in step:
            yield from _parts(part, sequence)
    else:
        yield step


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
