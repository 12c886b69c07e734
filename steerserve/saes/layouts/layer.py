"""Read the layer of an SAE from the names that layouts give it."""

import re

_OUTPUTS = re.compile(r"(?:\w+\.)*(?:blocks|layers?|h)\.(\d+)(?:\.hook_resid_post|\.output)?")
_SUBMODULES = re.compile(r"resid_post_layer_(\d+)")
_FOLDERS = re.compile(r"layer_(\d+)")


def of_module(name: str) -> int | None:
    """Layer of a module or hook whose output is a whole layer's: `blocks.3.hook_resid_post`, `model.layers.3`."""
    return _number(_OUTPUTS, name)


def of_submodule(name: str) -> int | None:
    """Layer of a name of dictionary_learning: `resid_post_layer_3`."""
    return _number(_SUBMODULES, name)


def of_folder(name: str) -> int | None:
    """Layer of a folder of Gemma Scope: `layer_3`."""
    return _number(_FOLDERS, name)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    return None if match is None else int(match[1])
