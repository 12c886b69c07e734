"""Command-line flags made from a frozen dataclass, so that a default and its help are written once.

The dataclass is read from its source, not imported: recipes live beside code that imports torch, and `--help` must
not wait for that. The help of a flag is the string literal under its field.
"""

import argparse
import ast
import importlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import steerserve
from steerserve.commands.values import argument_for
from steerserve.errors import SteerserveError

ROOT = Path(steerserve.__file__).parent.parent
PACKAGES = ("steerserve", "schedulers")


@dataclass(frozen=True)
class DocumentedField:
    """One field of a dataclass as its source has it; `default` is text, None where the field is required."""

    name: str
    annotation: ast.expr
    default: str | None
    help: str


@dataclass(frozen=True)
class FlagGroup:
    """The flags of one dataclass; `helps` describes fields that have no string under them, `skip` leaves fields out."""

    module: str
    name: str
    skip: Collection[str] = ()
    helps: Mapping[str, str] | None = None

    def fields(self) -> tuple[DocumentedField, ...]:
        """The fields that become flags, in their order."""
        return tuple(field for field in self._body() if field.name not in self.skip)

    def add_to(self, parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
        """Add one flag a field, under a heading of its own; a flag that is not given leaves the default alone."""
        group = parser.add_argument_group(title)
        for field in self.fields():
            text = _as_help(field.help or (self.helps or {}).get(field.name, ""))
            if field.default not in (None, "None", ""):
                text = f"{text} (default: {field.default})"
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(
                flag,
                dest=self._destination(field.name),
                default=argparse.SUPPRESS,
                required=field.default is None,
                help=text.strip().replace("%", "%%"),
                **argument_for(field.annotation, partial(type_behind, self.module)),
            )
        return group

    def given(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The values that were given on the command line, by field."""
        found = {field.name: field for field in self.fields()}
        values = {name: getattr(arguments, self._destination(name), None) for name in found}
        values = {name: value for name, value in values.items() if hasattr(arguments, self._destination(name))}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def build(self, arguments: argparse.Namespace, **fixed: Any) -> Any:
        """The dataclass with what was given, its own defaults otherwise, and `fixed` values for skipped fields.

        Raises SteerserveError where the dataclass refuses a value.
        """
        dataclass_type = getattr(importlib.import_module(self.module), self.name)
        try:
            return dataclass_type(**self.given(arguments), **fixed)
        except ValueError as error:
            raise SteerserveError(str(error)) from error

    def _destination(self, field: str) -> str:
        return f"{self.name}.{field}"

    def _body(self) -> list[DocumentedField]:
        found = definition(self.module, self.name)
        if not isinstance(found, ast.ClassDef):
            raise TypeError(f"{self.module} has no class {self.name}")
        body = found.body
        fields = []
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            default = _shown(node.value) if node.value is not None else None
            fields.append(DocumentedField(node.target.id, node.annotation, default, _string(after)))
        return fields


def definition(module: str, name: str) -> ast.Assign | ast.ClassDef | None:
    """A class or a named type such as `Unit = Literal[...]` of a module of ours, or of the one it imports it from."""
    for node in _tree(module).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return node
            case ast.ClassDef(name=target) if target == name:
                return node
            case ast.ImportFrom(module=str(source), names=names) if source.split(".")[0] in PACKAGES:
                if name in (imported.name for imported in names):
                    return definition(source, name)
    return None


def type_behind(module: str, name: str) -> ast.expr | None:
    """What a name that was given to a type stands for; None where it is no such name."""
    found = definition(module, name)
    return found.value if isinstance(found, ast.Assign) else None


def names_in(module: str, name: str) -> str:
    """The names that a mapping of a module of ours goes by, with commas between them, read from its source."""
    for node in _tree(module).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.Dict(keys=keys)) if target == name:
                return ", ".join(str(key.value) for key in keys if isinstance(key, ast.Constant))
    raise TypeError(f"{module} has no mapping {name}")


def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _shown(default: ast.expr) -> str:
    """A default as a person would type it; its source where that is no plain value."""
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
    if isinstance(value, tuple):
        return ("," if all(isinstance(item, int | float) for item in value) else " ").join(map(str, value))
    return str(value)


def _as_help(text: str) -> str:
    """A docstring in the manner of help texts: no capital at the start unless it is an acronym, no full stop."""
    text = text.removesuffix(".")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _string(node: ast.stmt | None) -> str:
    """The text of a string literal that stands alone, on one line; empty for anything else."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(inspect.cleandoc(node.value.value).split())
    return ""
