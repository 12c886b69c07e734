"""Networks of transformers as denoisers: their logits, sites and loops are those of the library's own models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from steerserve.config import ModelConfig
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import ArtifactError
from steerserve.models import load_model, open_checkpoint, open_model
from steerserve.models.families import family_of
from steerserve.models.families.denoiser import PUBLISHED
from steerserve.models.families.huggingface import HuggingFaceLM
from tests import tiny
from tests.models.families import huggingface_reference as reference

OWN = {"gpt2": "bos_token=[CLS]", "llama": "bos_token=[CLS]", "bert": "mask_token=[MASK]"}
"""What is said of those whose BOS is not of this vocabulary, and of the one that has a module of our own."""
BLOCKS = [name for name, one in PUBLISHED.items() if one.block is not None]
LENGTHS = [24, 19, 5]


def loaded(folder: Path, name: str, **changes: Any) -> tuple[Any, HuggingFaceLM]:
    """Transformers' own model of a folder, and ours."""
    theirs = reference.write(folder, name, **changes)
    ours = load_model(folder, denoiser=OWN.get(name))
    assert isinstance(ours, HuggingFaceLM)
    return theirs, ours


def tokens() -> Tensor:
    return torch.randint(5, tiny.VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", [name for name in reference.CLASSES if name not in BLOCKS])
def test_logits_and_sites_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    theirs, ours = loaded(tmp_path, name)
    expected = reference.straight(theirs, tokens(), LENGTHS)
    seen: dict[int, Tensor] = {}

    def sites(layer: int, hidden: Tensor) -> Tensor:
        seen[layer] = hidden
        return hidden

    lengths = torch.tensor(LENGTHS)
    hidden = ours(tokens(), lengths, sites)
    assert ours.facts.family == name
    assert sorted(seen) == [0, 1, 2]
    for row, length in enumerate(LENGTHS):
        assert_close(ours.head(hidden)[row, :length], expected.logits[row, :length])
        for layer in (0, 1):
            assert_close(seen[layer][row, :length], expected.hidden_states[layer + 1][row, :length])
        alone = ours(tokens()[row : row + 1, :length])
        assert_close(alone[0], hidden[row, :length])
    at = torch.tensor([[3, *range(4, 19)]] * 3)
    assert torch.equal(ours(tokens(), lengths, at=at), hidden.gather(1, at[:, :, None].expand(-1, -1, tiny.HIDDEN)))

    def push(layer: int, states: Tensor) -> Tensor:
        return states + torch.linspace(-1, 1, tiny.HIDDEN) ** 3 if layer == 1 else states

    assert float((ours(tokens(), lengths, push) - hidden).abs().max()) > 1e-2


def test_a_row_has_the_same_bits_on_a_wider_canvas_and_beside_others() -> None:
    for name in tiny.HUGGING_FACE:
        model = tiny.huggingface(name, 3)
        row = tokens()[:1, :20]
        wide = torch.cat([row, torch.full((1, 28), tiny.EOS)], 1)
        alone = model(row, torch.tensor([20]))
        both = model(torch.cat([wide, wide.flip(1)]), torch.tensor([20, 48]))
        assert torch.equal(alone[0], both[0, :20]), name


@pytest.mark.parametrize("name", ["a2d-qwen3", "modernbert", "gpt2"])
def test_weights_are_assigned_and_tied_not_copied(tmp_path: Path, name: str) -> None:
    _, model = loaded(tmp_path, name)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not [key for key, buffer in model.named_buffers() if buffer.is_meta]
    head = model.network.get_output_embeddings().weight
    assert head is model.network.get_input_embeddings().weight
    assert set(model.state_dict()) == set(load_file(tmp_path / "model.safetensors"))
    half = load_model(tmp_path, torch.bfloat16, denoiser=OWN.get(name))
    assert half.head(half(tokens())).isfinite().all()


@pytest.mark.parametrize("name", ["a2d-qwen3", "modernbert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize(("steps", "block"), [(16, 16), (8, 8)])
def test_the_published_loop_at_temperature_0(tmp_path: Path, name: str, steps: int, block: int) -> None:
    theirs, ours = loaded(tmp_path / "model", name)
    served = tiny.engine(ours, tmp_path)
    prompt = (7, 40, 55, 61, 20)
    how: dict[str, Any] = {"temperature": 0.0, "order": "confidence", "transfer": "linear"}
    params = GenerationParams(prompt=prompt, max_tokens=16, steps=steps, block_length=block, **how)
    start = [] if ours.facts.bos_id is None else [ours.facts.bos_id]
    expected = reference.masked_loop(theirs, [*start, *prompt], 16, block, steps, ours.facts.shift, tiny.MASK)
    end = next((i + 1 for i, token in enumerate(expected) if token in ours.facts.end_ids), 16)
    assert tiny.tokens_of(served, params)[:end] == expected[:end]


def test_diffugpts_own_names(tmp_path: Path) -> None:
    _, plain = loaded(tmp_path, "gpt2")
    extra = {"denoise_model.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    embedding = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    extra |= {"embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}

    def theirs(name: str) -> str | None:
        return None if name == "transformer.wte.weight" else name.replace("transformer.", "denoise_model.")

    reference.rename(tmp_path, theirs, **extra)
    again = load_model(tmp_path, denoiser=OWN["gpt2"])
    assert torch.equal(again(tokens()), plain(tokens()))
    assert (again.facts.shift, again.facts.mask_id, again.defaults.order) == (1, tiny.MASK, "random")


def test_a_file_of_the_base_model_alone_has_its_names_without_the_prefix(tmp_path: Path) -> None:
    _, plain = loaded(tmp_path, "gpt2")
    reference.rename(tmp_path, lambda name: name.removeprefix("transformer."))
    assert torch.equal(load_model(tmp_path, denoiser=OWN["gpt2"])(tokens()), plain(tokens()))


def test_an_embedding_that_was_resized_behind_the_configs_back(tmp_path: Path) -> None:
    _, plain = loaded(tmp_path, "gpt2")
    reference.change(tmp_path, vocab_size=tiny.VOCAB - 1)
    again = load_model(tmp_path, denoiser=OWN["gpt2"])
    assert again.facts.vocab_size == tiny.VOCAB
    assert torch.equal(again(tokens()), plain(tokens()))


def test_a_folder_that_is_no_denoiser_by_its_config_is_one_by_flags(tmp_path: Path) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    reference.change(tmp_path, model_type="qwen3", mask_token_id=None)
    with pytest.raises(ArtifactError, match="model_type is 'qwen3'.*--denoiser mask_token=TOKEN"):
        open_checkpoint(tmp_path)
    said = f"mask_token=[MASK], shift=1,attention=full,bos_token={tiny.CLS}"
    opened = open_model(tmp_path, ModelConfig(device="cpu", denoiser=said))
    facts = opened.facts
    assert (facts.family, facts.mask_id, facts.shift, facts.bos_id) == ("qwen3", tiny.MASK, 1, tiny.CLS)
    assert facts.end_ids == (tiny.EOS, tiny.PAD)


def test_a_chat_is_rendered_as_the_authors_do(tmp_path: Path) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if enable_thinking is false %}then{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = open_model(tmp_path, ModelConfig(device="cpu")).chat
    assert chat is not None
    assert chat.render([{"role": "user", "content": "the king"}]) == "the king then"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "mask=4",
            "'mask=4' is no key=value with a key of attention, base, block_length, bos_token, mask_token, shift",
        ),
        ("mask_token=4,mask_token=5", "mask_token is given twice"),
        ("mask_token=4,shift=2", "shift must be 0 or 1, got '2'"),
        ("mask_token=4,attention=causal", "attention must be full or block, got 'causal'"),
        ("mask_token=4,attention=block", "attention=block and block_length=N go together"),
        ("mask_token=4,attention=block,block_length=0", "block_length must be a whole number above 0, got '0'"),
        ("mask_token=<nothing>", "vocabulary has no '<nothing>', which is the mask_token; --denoiser mask_token=TOKEN"),
        ("mask_token=4,base=nothing", "has no network 'nothing'"),
        ("mask_token=4,base=t5", "t5 is no network of one stack of layers"),
        ("mask_token=4,base=mixtral", "mixtral is a mixture of experts"),
        ("mask_token=4,base=gemma2", "final_logit_softcapping is 30"),
        ("mask_token=4000", "mask token 4000 is no id from 0 to"),
        ("shift=0", "names no mask token"),
    ],
)
def test_what_is_said_wrongly_is_refused_by_its_name(tmp_path: Path, said: str, message: str) -> None:
    reference.write(tmp_path, "a2d-qwen3")
    reference.change(tmp_path, mask_token_id=None)
    if said == "shift=0":
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match=message):
        open_checkpoint(tmp_path, denoiser=said)


def test_an_autoregressive_model_is_no_denoiser(tmp_path: Path) -> None:
    reference.write(tmp_path, "llama")
    reference.change(tmp_path, mask_token_id=None)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ArtifactError, match="'llama' names no mask token.*an autoregressive model is no denoiser"):
        load_model(tmp_path)


@pytest.mark.parametrize("denoiser", [None, "mask_token=4,shift=0", "attention=block,block_length=256"])
def test_diffusion_gemma_is_refused_whatever_flags_say(denoiser: str | None) -> None:
    with pytest.raises(ArtifactError, match="'diffusion_gemma' is not served.*no mask token.*Missing for it"):
        family_of(Path("folder"), {"model_type": "diffusion_gemma"}, denoiser)
