"""Every SAE of a directory, and the choice among them.

The id of an SAE is the path of its folder below the directory: `layer-4-mask`, or in a sweep
`mask/resid_post_layer_16/trainer_0`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steerserve.errors import ArtifactError
from steerserve.saes.layouts.parts import Description
from steerserve.saes.reading import describe, layout_of, load_sae
from steerserve.saes.sae import SparseAutoencoder


def load_saes(
    directory: Path, layers: Sequence[int] | None = None, k: int | None = None
) -> dict[str, SparseAutoencoder]:
    """Every SAE at any depth below a directory, or the directory's own, by id and in order of the ids.

    `layers` and `k` choose by layer and by active features per token; one that is not to be had is an ArtifactError.
    So is a dictionary_learning sweep that has several k for a layer where none was chosen.
    """
    found = find_saes(directory)
    described = {name: describe(folder) for name, folder in found.items()}
    chosen = select(directory, described, layers, k)
    check_sweeps(found, {name: described[name] for name in chosen})
    return {name: load_sae(found[name], name) for name in chosen}


def find_saes(directory: Path) -> dict[str, Path]:
    """Folders of SAEs by id; folders whose names begin with a dot are left out."""
    if not directory.is_dir():
        raise ArtifactError(f"no SAE directory at {directory}")
    if layout_of(directory) is not None:
        return {directory.resolve().name: directory}
    found = {folder.relative_to(directory).as_posix(): folder for folder in _below(directory, {directory.resolve()})}
    return dict(sorted(found.items()))


def _below(directory: Path, seen: set[Path]) -> Iterator[Path]:
    for folder in directory.iterdir():
        # A link may lead back up.
        if folder.name.startswith(".") or not folder.is_dir() or folder.resolve() in seen:
            continue
        if layout_of(folder) is not None:
            yield folder
        else:
            yield from _below(folder, {*seen, folder.resolve()})


def select(
    directory: Path, described: Mapping[str, Description], layers: Sequence[int] | None, k: int | None
) -> list[str]:
    """Ids of the SAEs of these layers and of this k; an ArtifactError where a layer or the k is not to be had."""
    chosen = [
        name for name, one in described.items() if (layers is None or one.layer in layers) and (k is None or one.k == k)
    ]
    missing = sorted(set(layers or ()) - {described[name].layer for name in chosen})
    if missing or (k is not None and not chosen):
        asked = [f"layers {missing}"] * bool(missing) + [f"k {k}"] * (k is not None)
        raise ArtifactError(
            f"{directory} has no SAE of {' and '.join(asked)}; it has layers "
            f"{sorted({one.layer for one in described.values() if one.layer is not None})} and k "
            f"{sorted({one.k for one in described.values() if one.k is not None})}"
        )
    return chosen


def check_sweeps(folders: Mapping[str, Path], described: Mapping[str, Description]) -> None:
    """Raise an ArtifactError where dictionary_learning folders beside each other differ only in k: a sweep, of which
    nobody wants every SAE in memory."""
    sweeps: dict[tuple[Path, int | None, str | None], set[int]] = defaultdict(set)
    for name, one in described.items():
        if one.k is not None and layout_of(folders[name]) == "dictionary_learning":
            sweeps[folders[name].parent, one.layer, one.policy].add(one.k)
    for (parent, layer, policy), several in sweeps.items():
        if len(several) > 1:
            trained = f", policy {policy}" if policy else ""
            raise ArtifactError(
                f"{parent} has SAEs of k {sorted(several)} for layer {layer}{trained}: choose one k (--sae-k)"
            )
