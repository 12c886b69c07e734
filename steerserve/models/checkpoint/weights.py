"""The tensors of a model folder: safetensors mapped into memory, or a pickled checkpoint that runs no code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerserve.digests import files_sha256
from steerserve.errors import ArtifactError
from steerserve.models.checkpoint.config import read_object
from steerserve.pickles import SUFFIX as CONVERTED
from steerserve.pickles import convert, converted, load_pickle
from steerserve.pointers import refuse_pointer

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
LIGHTNING = "*.ckpt"


@dataclass(frozen=True)
class Weights:
    """A folder's tensors by their names on disk, mapped where the format allows: a page is read when it is touched."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    """What a person should know of how they were read."""
    unconverted: Mapping[Path, Mapping[str, Tensor]] | None = None
    """The tensors of each pickle that is not kept as safetensors yet."""

    def keep_converted(self) -> tuple[str, ...]:
        """Keep the tensors of pickles as safetensors beside them, where the folder can be written to; notes on it."""
        notes = []
        for path, tensors in (self.unconverted or {}).items():
            made = convert(path, tensors)
            kept = f"converted once to {made.name}" if made else "not converted: the folder cannot be written to"
            notes.append(f"{path.name}: {kept}")
        return tuple(notes)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: one, or the shards that an index names; safetensors before pickles.

    A whole file comes before an index, as in transformers: an index left beside it belongs to weights that are gone.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    checkpoints = sorted(folder.glob(LIGHTNING))
    if len(checkpoints) != 1:
        found = f"; it has {len(checkpoints)} checkpoints, and which one is not said" if checkpoints else ""
        raise ArtifactError(f"{folder} has no {SAFETENSORS}, no {PICKLE} and no single {LIGHTNING}{found}")
    return checkpoints


def weights_sha256(folder: Path, anew: bool = False) -> str:
    """SHA-256 over the weight files in name order: the identity of a model, recorded in what is made from it.

    It is remembered while the files stay as they are; `anew` reads them whatever is remembered.
    """
    return files_sha256(weight_files(folder), anew)


def read_weights(folder: Path, originals: bool = False) -> Weights:
    """Every tensor of a model folder on the CPU; raises ArtifactError naming the file that cannot be read.

    `originals` reads pickles themselves, never what was once converted from them, and keeps no conversion.
    """
    tensors: dict[str, Tensor] = {}
    unconverted: dict[Path, Mapping[str, Tensor]] = {}
    notes: list[str] = []
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            found = _mapped(file)
        elif not originals and (kept := converted(file)) is not None:
            found = kept
            notes.append(f"{file.name}: read from {file.name}{CONVERTED}")
        else:
            found, note = _state(file)
            unconverted |= {} if originals else {file: found}
            notes += [note] if note else []
        if twice := tensors.keys() & found.keys():
            raise ArtifactError(f"{folder}: tensor {min(twice)} is in two shards")
        tensors |= found
    return Weights(tensors, tuple(notes), unconverted)


def _shards(index: Path) -> list[Path]:
    try:
        shards = sorted({str(shard) for shard in read_object(index)["weight_map"].values()})
    except (KeyError, AttributeError) as error:
        raise ArtifactError(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
    # A shard is a file of this folder; an index must not make the server read another.
    if any(Path(shard).name != shard for shard in shards):
        raise ArtifactError(f"{index} names a shard outside its folder: {shards}")
    if not shards:
        raise ArtifactError(f"{index} names no shard")
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise ArtifactError(f"{index.parent} has no {shard}")
    return [index.parent / shard for shard in shards]


def _mapped(file: Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it has no __iter__)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is not a whole safetensors file: {error}") from error


def _state(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a pickle by name, and what is left out of it: a Lightning checkpoint has them in `state_dict`."""
    raw: Any = load_pickle(file)
    note = None
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        taken = "its state_dict is taken"
        others = sorted(str(key) for key in raw if key not in ("state_dict", "ema"))
        state = raw["state_dict"]
        if "ema" in raw:
            state = _averaged(file, state, raw["ema"])
            taken = "the averaged weights of its ema are taken"
        note = f"{file.name}: {taken}" + (f", not its {', '.join(others)}" if others else "")
        raw = state
    if not isinstance(raw, Mapping) or not raw:
        raise ArtifactError(f"{file} holds no tensors by name")
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtifactError(f"{file}: {name!r} is a {type(value).__name__}, expected tensors by name")
    return {name: tensor.detach() for name, tensor in raw.items()}, note


def _averaged(file: Path, state: Mapping[Any, Any], ema: Any) -> dict[Any, Any]:
    """A Lightning state with its parameters replaced by their moving averages, which MDLM's authors sample with.

    Their `ExponentialMovingAverage` keeps a list in the order of the parameters, which is that of the state without
    its one buffer, the rotary frequencies.
    """
    names = [name for name in state if not str(name).endswith("rotary_emb.inv_freq")]
    averages = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if (
        not isinstance(averages, list)
        or len(averages) != len(names)
        or any(getattr(one, "shape", None) != state[name].shape for name, one in zip(names, averages, strict=True))
    ):
        raise ArtifactError(
            f"{file}: its ema has no shadow_params of the shapes of its {len(names)} parameters, in their order"
        )
    return dict(state) | dict(zip(names, averages, strict=True))
