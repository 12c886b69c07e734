"""Tokenizers: byte-level BPE from its published files equals `transformers`' own classes, on vocabularies made here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds

from steerserve.errors import ArtifactError
from steerserve.models import load_tokenizer
from steerserve.models.tokenizer import special_tokens
from tests import tiny

TEXTS = (
    "The team won the match, and they've won 2024 more!\n\nSo it's said: “naïve café”, ﬁne.",
    "def main(argv):\n    print('hello   world')  # done\r\n\treturn 12345",
    "日本語のテキスト と 한국어 и русский, 🙂🙃 e\u0301 é\u00a0 end",
)
DREAM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
TOOL = "<tool_call>"


def learn(folder: Path, tokens: int = 420) -> int:
    """Write `vocab.json` and `merges.txt` of a small byte-level BPE; how many tokens it has."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    made.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.model.save(str(folder))
    return made.get_vocab_size()


def dream(folder: Path) -> Path:
    """A folder as Dream's: the tokens that are not BPE's in `added_tokens_decoder`, one of them no special one."""
    size = learn(folder)
    added = {str(size + i): {"content": token, "special": True, "normalized": False} for i, token in enumerate(DREAM)}
    added[str(size + len(DREAM))] = {"content": TOOL, "special": False, "normalized": False}
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "added_tokens_decoder": added,
            "bos_token": "<|beginoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": {"content": "<|endoftext|>"},
            "mask_token": "<|mask|>",
            "unk_token": None,
        },
    )
    # What must never run.
    (folder / "tokenization_dream.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nraise SystemExit\n")
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def reference(folder: Path, kind: Any, added: Sequence[tuple[str, bool]] = ()) -> Any:
    """The tokenizer as `transformers` makes it of the same two files, tokens added in the order given."""
    made = kind(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    for token, special in added:
        made.add_tokens([transformers.AddedToken(token, special=special, normalized=False)], special_tokens=special)
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Ours and transformers', of one folder each."""
    folder = tmp_path_factory.mktemp("dream")
    theirs = [*((token, True) for token in DREAM), (TOOL, False)]
    gpt2 = tmp_path_factory.mktemp("gpt2")
    learn(gpt2)
    raw = json.loads((gpt2 / "vocab.json").read_text(encoding="utf-8"))
    write(gpt2 / "vocab.json", raw | {"<|endoftext|>": len(raw)})
    return {
        "dream": (load_tokenizer(dream(folder)), reference(folder, transformers.Qwen2Tokenizer, theirs)),
        "gpt2": (load_tokenizer(gpt2, "mdlm"), reference(gpt2, transformers.GPT2Tokenizer)),
    }


PIECES = st.sampled_from([*TEXTS, *DREAM, TOOL, " ", "\n", "  \n ", "'ll", "don't", "1234", "e\u0301", "ﬁ", "\u00a0"])


@pytest.mark.parametrize("kind", ["dream", "gpt2"])
@given(pieces=st.lists(st.one_of(PIECES, st.text(max_size=12)), max_size=6))
def test_every_text_is_encoded_as_by_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str, pieces: list[str]
) -> None:
    ours, theirs = pairs[kind]
    text = "".join(pieces)
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("kind", ["dream", "gpt2"])
def test_the_vocabulary_is_that_of_transformers(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    assert ours.get_vocab() == theirs.get_vocab()


def test_special_tokens_are_one_token_each_and_no_text(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, _ = pairs["dream"]
    ids = ours.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False).ids
    assert [ours.id_to_token(ids[0]), ours.id_to_token(ids[-1])] == ["<|im_start|>", "<|im_end|>"]
    assert ours.decode(ids, skip_special_tokens=True) == "user\nhi"
    tool = ours.encode(TOOL, add_special_tokens=False).ids
    assert len(tool) == 1
    assert ours.decode(tool, skip_special_tokens=True) == TOOL


def test_code_beside_the_files_is_never_run(tmp_path: Path) -> None:
    load_tokenizer(dream(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_added_tokens_may_stand_in_their_own_file_with_gaps(tmp_path: Path) -> None:
    size = learn(tmp_path)
    write(tmp_path / "added_tokens.json", {"<|im_end|>": size + 7, "<|mask|>": size + 2, "<tool>": size})
    write(tmp_path / "special_tokens_map.json", {"mask_token": {"content": "<|mask|>"}, "eos_token": "<|im_end|>"})
    found = load_tokenizer(tmp_path, "dream")
    assert found.encode("<|im_end|><|mask|><tool>", add_special_tokens=False).ids == [size + 7, size + 2, size]
    assert found.decode([size + 7, size + 2, size], skip_special_tokens=True) == "<tool>"
    assert special_tokens(tmp_path) == {"mask_token": "<|mask|>", "eos_token": "<|im_end|>"}


def test_the_class_named_says_how_text_is_split_and_else_the_family(tmp_path: Path) -> None:
    learn(tmp_path, 700)
    digits = {family: len(load_tokenizer(tmp_path, family).encode("12345").ids) for family in ("dream", "mdlm")}
    assert digits["dream"] == 5
    assert digits["mdlm"] < 5
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert len(load_tokenizer(tmp_path, "dream").encode("12345").ids) == digits["mdlm"]
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ArtifactError, match="tokenizer_class is 'LlamaTokenizer'"):
        load_tokenizer(tmp_path, "dream")


def test_a_character_split_over_tokens_is_whole_once_all_of_it_is_there(tmp_path: Path) -> None:
    learn(tmp_path, 257)
    found = load_tokenizer(tmp_path, "mdlm")
    ids = found.encode("🙂", add_special_tokens=False).ids
    assert len(ids) == 4
    assert found.decode(ids) == "🙂"
    assert all(set(found.decode(ids[:size])) == {"\ufffd"} for size in (1, 2, 3))


def test_a_tokenizer_json_is_read_and_its_truncation_is_not(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert found.get_vocab_size() == tiny.VOCAB
    assert len(found.encode("the team won the match", add_special_tokens=False).ids) == 5


def test_tokens_that_a_tokenizer_json_lacks_are_added_under_their_ids(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    decoder = {str(tiny.VOCAB): {"content": "<|eot|>", "special": True}, str(tiny.MASK): {"content": "[MASK]"}}
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    assert load_tokenizer(tmp_path).encode("<|eot|>", add_special_tokens=False).ids == [tiny.VOCAB]
    decoder[str(tiny.VOCAB + 3)] = decoder.pop(str(tiny.VOCAB))
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(ArtifactError, match=rf"'<\|eot\|>' is {tiny.VOCAB} in tokenizer.json, {tiny.VOCAB + 3} in"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_to_name(tmp_path: Path) -> None:
    for present in ("config.json", "vocab.json"):
        write(tmp_path / present, {})
        with pytest.raises(
            ArtifactError, match=r"has no tokenizer\.json, nor vocab\.json and merges\.txt; --tokenizer"
        ):
            load_tokenizer(tmp_path, "mdlm")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "", "is not a tokenizer"),
        ("vocab.json", "[]", "must hold a JSON object"),
        ("vocab.json", '{"a": "b"}', "no BPE vocabulary"),
        ("merges.txt", "#version: 0.2\nĠt he", "no BPE vocabulary"),
        ("merges.txt", "a b c", "no BPE vocabulary"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added tokens cannot be read"),
        ("added_tokens.json", '{"<a>": "b"}', "added tokens cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    learn(tmp_path, 257)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=said) as error:
        load_tokenizer(tmp_path, "mdlm")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
