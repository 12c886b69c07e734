"""Tokenizers: what a folder's files say of one, together, is what texts are read and written by."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds

from steerserve.errors import ArtifactError
from steerserve.models import load_tokenizer
from steerserve.models.text.tokenizer import open_tokenizer
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
    found = load_tokenizer(dream(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": [None, "tokenization_dream.DreamTokenizer"]}, "trust_remote_code": True}
    write(tmp_path / "tokenizer_config.json", config | code)
    write(tmp_path / "config.json", {"model_type": "Dream", "auto_map": {"AutoConfig": "tokenization_dream.Dream"}})
    assert load_tokenizer(tmp_path).get_vocab() == found.get_vocab()
    found.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).get_vocab() == found.get_vocab()
    assert not (tmp_path / "executed").exists()


def test_added_tokens_may_stand_in_their_own_file(tmp_path: Path) -> None:
    size = learn(tmp_path)
    write(tmp_path / "added_tokens.json", {"<tool>": size, "<|mask|>": size + 1, "<|im_end|>": size + 2})
    write(tmp_path / "special_tokens_map.json", {"mask_token": {"content": "<|mask|>"}, "eos_token": "<|im_end|>"})
    found, theirs = open_tokenizer(tmp_path, "dream")
    ids = [size + 2, size + 1, size]
    assert found.encode("<|im_end|><|mask|><tool>", add_special_tokens=False).ids == ids
    assert found.decode(ids, skip_special_tokens=True) == "<tool>"
    assert (theirs.mask_token, theirs.eos_token) == ("<|mask|>", "<|im_end|>")


@pytest.mark.parametrize("kind", ["tokenizer.json", "merges"])
def test_two_ids_of_one_token_are_refused(tmp_path: Path, kind: str) -> None:
    size = learn(tmp_path) if kind == "merges" else tiny.VOCAB
    if kind == "tokenizer.json":
        tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "added_tokens.json", {"<|eot|>": size + 3})
    with pytest.raises(ArtifactError, match=rf"'<\|eot\|>' is {size} in its vocabulary, {size + 3} in the files"):
        load_tokenizer(tmp_path, "mdlm")


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


KING = tiny.PIECES.index("king")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
SPECIAL_BESIDE: dict[str, dict[str, Any]] = {
    "a role": {"tokenizer_config.json": {"eos_token": "king"}},
    "a role as an object": {"tokenizer_config.json": {"eos_token": {"content": "king"}}},
    "a role of its own": {"tokenizer_config.json": {"turn_token": "king"}},
    "a further one": {"tokenizer_config.json": {"additional_special_tokens": ["king"]}},
    "the decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": {str(KING): {"content": "king", "special": True} | FLAGS}}
    },
    "a role that the decoder calls plain": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(KING): {"content": "king", "special": False} | FLAGS},
            "eos_token": "king",
        }
    },
    "the map": {"special_tokens_map.json": {"eos_token": {"content": "king"}}},
    "the map's further ones": {"special_tokens_map.json": {"additional_special_tokens": [{"content": "king"}]}},
    "the map beside a decoder": {
        "special_tokens_map.json": {"eos_token": "king"},
        "tokenizer_config.json": {"added_tokens_decoder": {str(tiny.MASK): {"content": "[MASK]", "special": True}}},
    },
}


@pytest.mark.parametrize("plain", [False, True], ids=["of the vocabulary", "added as a plain one"])
@pytest.mark.parametrize("said", SPECIAL_BESIDE)
def test_a_token_that_any_file_calls_special_is_special(tmp_path: Path, said: str, plain: bool) -> None:
    made = tiny.tokenizer()
    if plain:
        made.add_tokens([AddedToken("king", special=False, normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    for name, content in SPECIAL_BESIDE[said].items():
        write(tmp_path / name, content)
    found = load_tokenizer(tmp_path)
    ids = found.encode("the king won", add_special_tokens=False).ids
    assert ids[1] == KING
    assert found.decode(ids, skip_special_tokens=True) == "the won"
    assert found.get_vocab() == tiny.tokenizer().get_vocab()


@pytest.mark.parametrize("kind", ["tokenizer.json", "merges"])
def test_a_special_token_that_no_file_gives_an_id_gets_none(tmp_path: Path, kind: str) -> None:
    learn(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    if kind == "tokenizer.json":
        load_tokenizer(tmp_path, "mdlm").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"pad_token": "[PAD]", "additional_special_tokens": ["<more>"]})
    found = load_tokenizer(tmp_path, "mdlm")
    assert found.get_vocab() == vocabulary
    ids = found.encode("[PAD]<more>", add_special_tokens=False).ids
    assert found.decode(ids, skip_special_tokens=True) == "[PAD]<more>"


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "DreamTokenizer"])
@pytest.mark.parametrize("whole", [False, True], ids=["merges", "tokenizer.json"])
def test_a_space_before_the_text_is_put_where_the_config_says_so(tmp_path: Path, name: str, whole: bool) -> None:
    learn(tmp_path)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
    plain = load_tokenizer(tmp_path)
    if whole:
        plain.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, "add_prefix_space": True})
    spaced = load_tokenizer(tmp_path)
    assert spaced.encode("team").ids == plain.encode(" team").ids != plain.encode("team").ids
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, "add_prefix_space": False})
    assert load_tokenizer(tmp_path).encode("team").ids == plain.encode("team").ids


def berts(folder: Path, **config: object) -> Path:
    """A folder as BERT's first ones: a list of pieces."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join((*tiny.PIECES, "King", "é", "e")), encoding="utf-8")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"} | config)
    return folder


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_a_list_of_pieces_is_berts_tokenizer(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = berts(tmp_path / "bert", **config)
    theirs = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    found = load_tokenizer(folder, "bert")
    for text in ("The King won.", "é won", "king, team"):
        assert found.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    # Saved whole by another library, which knew nothing of the config.
    load_tokenizer(berts(tmp_path / "plain"), "bert").save(str(folder / "tokenizer.json"))
    whole = load_tokenizer(folder, "bert")
    for text in ("The King won.", "é won"):
        assert whole.encode(text).ids == found.encode(text).ids


def test_a_tokenizer_json_is_taken_at_its_word_whatever_the_model(tmp_path: Path) -> None:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", {"model_type": "bert"})
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    # BERT's own splits at hyphens, this one at spaces only.
    assert load_tokenizer(tmp_path, "bert").encode("team-king").ids == tiny.tokenizer().encode("team-king").ids


def test_no_hub_is_asked_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer(dream(tmp_path / "dream"))
    berts(tmp_path / "bert")
    load_tokenizer(tmp_path / "bert")
    # As many tokens as make transformers look for a fault of Mistral's, of a folder that does not say what it is of.
    many = Tokenizer(kinds.WordLevel({str(i): i for i in range(100_001)}, unk_token="0"))
    many.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "many").mkdir()
    many.save(str(tmp_path / "many" / "tokenizer.json"))
    write(tmp_path / "many" / "config.json", {"vocab_size": 100_001})
    load_tokenizer(tmp_path / "many")
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_tokenizer_says_what_to_name(tmp_path: Path) -> None:
    for present in ("config.json", "vocab.json"):
        write(tmp_path / present, {})
        with pytest.raises(ArtifactError, match=r"has no tokenizer\.json, nor vocab\.json and .*; --tokenizer"):
            load_tokenizer(tmp_path, "mdlm")
    (tmp_path / "merges.txt").touch()
    with pytest.raises(ArtifactError, match=r"of a bert tokenizer no vocab\.txt"):
        load_tokenizer(tmp_path, "bert")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "", "is not JSON"),
        ("vocab.json", "[]", "must hold a JSON object"),
        ("vocab.json", '{"a": "b"}', "no gpt2 tokenizer"),
        ("merges.txt", "#version: 0.2\nĠt he", "no gpt2 tokenizer"),
        ("merges.txt", "a b c", "no gpt2 tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added tokens cannot be read"),
        ("added_tokens.json", '{"<a>": "b"}', "added tokens cannot be read"),
        ("tokenizer_config.json", '{"eos_token": 3}', "a special token must be text"),
        ("tokenizer_config.json", '{"eos_token": {"text": "<a>"}}', "a special token must be text"),
        ("tokenizer_config.json", '{"additional_special_tokens": [3]}', "a special token must be text"),
        ("special_tokens_map.json", '{"additional_special_tokens": "<a>"}', "must be a list of tokens, got '<a>'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    learn(tmp_path, 257)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=said) as error:
        load_tokenizer(tmp_path, "mdlm")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
