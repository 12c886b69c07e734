"""The model inside vLLM's workers: a bidirectional Llama of vLLM's parallel layers, with sites at layer outputs."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer

from steerserve.engine.vllm.checkpoint import facts_from_json, llama_name
from steerserve.engine.vllm.worker.pooler import StepPooler
from steerserve.engine.vllm.worker.step import WorkerStep
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM

_STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}
"""Tensors that vLLM's layers hold as parts of one."""


class Backbone(nn.Module):
    """Embedding, layers with sites, and the final norm."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quantised = vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, quant_config=quantised)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(vllm_config=vllm_config, prefix=f"model.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, step: WorkerStep | None) -> Tensor:
        """Final states [T, hidden_size] of tokens [T]."""
        hidden = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            # A layer's output is a pair whose sum is the state. The next layer's norm would add the two in place and,
            # in half precision, round otherwise than here: a row must not differ by whether one beside it is steered,
            # so the sum is made at every layer, steered or not.
            branch, residual = layer(positions, hidden, None)
            hidden = branch + residual
            if step is not None:
                hidden = step(index, hidden)
        out: Tensor = self.norm(hidden)
        return out


class ParallelHead(DiffusionLM):
    """What the sampler needs of a model: its facts, and logits of states, gathered from every rank."""

    def __init__(self, owner: "SteeredDiffusionLM") -> None:
        super().__init__()
        # Not as a submodule: its parameters are the owner's.
        self.__dict__["_owner"] = owner
        self.facts = owner.facts

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size]; every rank must call it together, and gets all of them."""
        owner: SteeredDiffusionLM = self.__dict__["_owner"]
        return owner.compute_logits(hidden)


class SteeredDiffusionLM(nn.Module):
    """LLaDA or Dream in vLLM, with steered layers; `steerserve.engine.vllm.checkpoint.llama_config` makes its
    config."""

    is_pooling_model: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.facts = facts_from_json(vllm_config.additional_config["steerserve"]["facts"])
        self.model = Backbone(vllm_config)
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head" if prefix else "lm_head",
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.announced: Callable[[Tensor], WorkerStep | None] = _nothing
        """What rows lie in the flat batch of tokens [T] that is about to run; set by whoever knows the runner."""
        self.pooler = StepPooler(ParallelHead(self))

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """What tells the model of its batch under Model Runner V2."""
        from steerserve.engine.vllm.worker.state import SteeredModelState

        return SteeredModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final states [T, hidden_size] of vLLM's flat batch, steered as the requests in it ask."""
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise ValueError("this model takes token ids, and all its layers run on every rank")
        step = self.announced(input_ids)
        self.pooler.step = step
        out: Tensor = self.model(input_ids, positions, step)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [N, vocab_size] of states [N, hidden_size]: each rank's share of the vocabulary, gathered."""
        logits: Tensor = self.lm_head.quant_method.apply(self.lm_head, hidden_states)
        if self.lm_head.tp_size > 1:
            logits = tensor_model_parallel_all_gather(logits)
        # Vocabularies are padded to whole shares, and some checkpoints' to rows of no token.
        logits = logits[:, : self.facts.vocab_size]
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors by its own names; raises ArtifactError for one that does not belong, or is
        missing."""
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        for own, tensor in weights:
            name = llama_name(self.facts.family, own)
            shard: tuple[str | int, ...] = ()
            for part, (whole, share) in _STACKED.items():
                if part in name:
                    name, shard = name.replace(part, whole), (share,)
            if name not in parameters:
                raise ArtifactError(f"tensor {own!r} has no place in the model")
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", _copied)
            load(parameter, tensor, *shard)
            loaded.add(name)
        if missing := sorted(parameters.keys() - loaded):
            raise ArtifactError(f"the checkpoint lacks what {', '.join(missing[:8])} are loaded from")
        return loaded


def _nothing(tokens: Tensor) -> WorkerStep | None:  # noqa: ARG001 (the interface's)
    return None


def _copied(parameter: nn.Parameter, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise ArtifactError(f"a tensor is {list(tensor.shape)}, expected {list(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(tensor)
