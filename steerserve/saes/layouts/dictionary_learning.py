"""Reader of dictionary_learning folders (https://github.com/saprmarks/dictionary_learning), DLM-Scope's among them.

A folder holds `ae.pt`, a state dict, and `config.json` with `trainer` and `buffer`; in a sweep it is
`resid_post_layer_16/trainer_0`. `resid_post_layer_16` is the output of block 16, counted from 0. The pickle is read
without running what is in it, and kept as safetensors beside it for the next start.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steerserve.errors import ArtifactError
from steerserve.pickles import convert, converted, load_pickle
from steerserve.saes.activation import Activation, JumpRelu, Relu, TopK
from steerserve.saes.layouts import layer as layers
from steerserve.saes.layouts.files import checked, choose_k, known, read_json, whole
from steerserve.saes.layouts.fold import gated, plain_input, unit_decoder
from steerserve.saes.layouts.parts import Description, Parts
from steerserve.saes.sae import Policy

CONFIG, WEIGHTS = "config.json", "ae.pt"

POLICIES: dict[str, Policy | None] = {"mask": "mask", "unmask": "visible", "all": None, "clean": None}
"""DLM-Scope's `dlm_mask_policy`: which positions it trained on (SAE4DLM, train_dlm_sae)."""

UNFINISHED = "an unfinished training"
OWN_LOADER = (
    "features are encoded as in training, of h - b_dec; the loader of DLM-Scope's own steering script leaves - b_dec "
    "out, so that activations, and what boost adds, differ from that script's"
)
"""Said of DLM-Scope's SAEs, whose released steering script and training class do not agree (SAE4DLM, steering)."""

INTEGERS = ("k", "group_sizes")
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")

OURS = {
    "encoder.bias": "b_enc",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
"""Our names of tensors that are ours but for the name."""
TURNED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""Our names of tensors that are ours transposed."""


@dataclass(frozen=True)
class Form:
    """A dictionary class: the tensors it saves, and what it does beyond its activation."""

    tensors: tuple[str, ...]
    activation: Callable[[Mapping[str, Tensor]], Activation]
    optional: tuple[str, ...] = ()
    subtracts: bool = True
    """True if the decoder's bias is subtracted before encoding."""
    unit: bool = False
    """True if the library makes the decoder's rows unit vectors when it loads."""

    def shapes(self, hidden_size: int, features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        every: dict[str, tuple[int, ...]] = {
            "encoder.weight": (features, hidden_size),
            "decoder.weight": (hidden_size, features),
            "W_enc": (hidden_size, features),
            "W_dec": (features, hidden_size),
            "k": (),
            "threshold": () if "k" in self.tensors else (features,),
            "group_sizes": (-1,),
        }
        every |= dict.fromkeys(("b_dec", "bias", "decoder.bias", "decoder_bias"), (hidden_size,))
        every |= dict.fromkeys(("b_enc", "encoder.bias", "r_mag", "gate_bias", "mag_bias"), (features,))
        return {name: every[name] for name in self.tensors}


def _batch_top_k(tensors: Mapping[str, Tensor]) -> Activation:
    threshold = tensors["threshold"]
    if not bool(threshold >= 0):
        raise ArtifactError(
            f"{WEIGHTS}: threshold is {float(threshold)}: it is of {UNFINISHED}, which stored none yet, and without it "
            "a token cannot be encoded by itself; the library's own class would let every positive pre-activation "
            "through. Train on, past `threshold_start_step`"
        )
    return JumpRelu(threshold)


def remarks_on(trainer: Mapping[str, Any], buffer: Mapping[str, Any], found: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What whoever loads an SAE of this config and these tensors should know."""
    threshold = found.get("threshold")
    unfinished = threshold is not None and "k" in found and not bool(threshold >= 0)
    remarks = []
    if unfinished:
        remarks.append(f"its threshold is {float(found['threshold'])}: {WEIGHTS} is of {UNFINISHED}, and read as it is")
    if "dlm_mask_policy" in buffer and trainer["dict_class"] == "AutoEncoderTopK" and bool(found["b_dec"].any()):
        remarks.append(OWN_LOADER)
    return tuple(remarks)


FORMS: dict[str, Form] = {
    "AutoEncoder": Form((*LINEAR, "bias"), lambda _: Relu(), unit=True),
    "AutoEncoderNew": Form((*LINEAR, "decoder.bias"), lambda _: Relu(), subtracts=False),
    "AutoEncoderTopK": Form(
        (*LINEAR, "b_dec", "k", "threshold"), lambda tensors: TopK(int(tensors["k"])), optional=("threshold",)
    ),
    "BatchTopKSAE": Form((*LINEAR, "b_dec", "k", "threshold"), _batch_top_k),
    "MatryoshkaBatchTopKSAE": Form((*MATRICES, "k", "threshold", "group_sizes"), _batch_top_k),
    "GatedAutoEncoder": Form(
        ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
        lambda tensors: JumpRelu(gated(tensors)[1]),
    ),
    "JumpReluAutoEncoder": Form(
        (*MATRICES, "threshold"), lambda tensors: JumpRelu(tensors["threshold"]), subtracts=False
    ),
}


def describe(folder: Path) -> Description:
    """What the config and the folder's name say."""
    trainer, buffer = read_config(folder)
    policy = buffer.get("dlm_mask_policy")
    if policy is not None:
        known("dlm_mask_policy", policy, POLICIES)
    return Description(
        activation=trainer["dict_class"],
        layer=layer_of(folder, trainer),
        policy=None if policy is None else POLICIES[policy],
        k=choose_k(trainer, trainer["dict_size"]) if "k" in FORMS[trainer["dict_class"]].tensors else None,
        metadata={"trainer": trainer, "buffer": buffer},
    )


def read(folder: Path) -> Parts:
    """The weights under our names; a matrix of a linear layer is transposed without a copy."""
    trainer, buffer = read_config(folder)
    form, hidden_size, features = FORMS[trainer["dict_class"]], trainer["activation_dim"], trainer["dict_size"]
    found = read_state(folder / WEIGHTS, form, hidden_size, features)
    if "k" in found and int(found["k"]) != choose_k(trainer, features):
        raise ArtifactError(
            f"{WEIGHTS}: k is {int(found['k'])}, but {CONFIG} says {trainer['k']}; a larger one is of {UNFINISHED} "
            "with `k_anneal_steps`, which comes down to the config's"
        )
    held = {OURS.get(name, name): tensor for name, tensor in found.items() if name not in TURNED}
    held |= {TURNED[name]: tensor.T for name, tensor in found.items() if name in TURNED}
    activation = form.activation(held)
    if "r_mag" in held:
        held, _ = gated(held)
    if not form.subtracts:
        held = plain_input(held)
    if form.unit:
        held = unit_decoder(held)
    return Parts({name: held[name] for name in MATRICES}, activation, remarks_on(trainer, buffer, found))


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`trainer` and `buffer` of the config; a class or a place in the model that we could not honour is refused."""
    config = read_json(folder / CONFIG)
    trainer, buffer = read_object(config, "trainer"), read_object({"buffer": {}} | config, "buffer")
    known("dict_class", trainer.get("dict_class"), FORMS)
    for name in ("activation_dim", "dict_size"):
        whole(trainer, name)
    if buffer.get("io", "out") != "out":
        raise ArtifactError(f"io: {buffer['io']!r}, but an SAE of a layer's output ('out') is needed")
    if buffer.get("d_submodule", trainer["activation_dim"]) != trainer["activation_dim"]:
        raise ArtifactError(
            f"d_submodule: {buffer['d_submodule']!r} contradicts activation_dim {trainer['activation_dim']}"
        )
    return trainer, buffer


def read_object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that must be an object."""
    value = config.get(name)
    if not isinstance(value, dict):
        raise ArtifactError(f"{CONFIG}: {name} must be an object, got {value!r}")
    return value


def layer_of(folder: Path, trainer: Mapping[str, Any]) -> int | None:
    """The layer that `layer`, `submodule_name` and the folders' names agree on; None where none of them says one."""
    found: dict[str, int] = {}
    submodule = trainer.get("submodule_name")
    if submodule is not None:
        layer = layers.of_submodule(submodule) if isinstance(submodule, str) else None
        layer = layers.of_module(submodule) if layer is None and isinstance(submodule, str) else layer
        if layer is None:
            raise ArtifactError(
                f"submodule_name: {submodule!r}, but a layer's output is needed, such as 'resid_post_layer_3'"
            )
        found[f"submodule_name {submodule!r}"] = layer
    if trainer.get("layer") is not None:
        found[f"layer {trainer['layer']!r}"] = whole(trainer, "layer", least=0)
    for path in (folder.resolve(), folder.resolve().parent):
        if (named := layers.of_submodule(path.name)) is not None:
            found[f"folder {path.name!r}"] = named
    if len(set(found.values())) > 1:
        raise ArtifactError(f"{CONFIG}: {' contradicts '.join(found)}")
    return next(iter(found.values()), None)


def read_state(path: Path, form: Form, hidden_size: int, features: int) -> dict[str, Tensor]:
    """The checked tensors of a state dict, from its safetensors copy where there is one; else the copy is made."""
    if not path.is_file():
        raise ArtifactError(f"{path.name} is not there")
    kept = converted(path)
    found = load_pickle(path) if kept is None else kept
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ArtifactError(f"{path.name} holds {type(found).__name__}, but tensors by name are needed")
    tensors = checked(WEIGHTS, found, form.shapes(hidden_size, features), form.optional, INTEGERS)
    groups = tensors.get("group_sizes")
    if groups is not None and int(groups.sum()) != features:
        raise ArtifactError(f"{WEIGHTS}: group_sizes {groups.tolist()} do not make {features} features")
    if kept is None:
        convert(path, found)
    return tensors
