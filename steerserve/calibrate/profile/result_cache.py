"""Results of a measurement on disk, so that one that was stopped goes on where it was."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from steerserve.calibrate.provenance import differing
from steerserve.errors import ArtifactError

T = TypeVar("T")


class ResultCache:
    """A folder of JSON values by name, all measured under the same settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises ArtifactError where the folder holds what was found under other settings."""
        self.folder, self._settings = folder, json.loads(json.dumps(settings))
        if not self._path("settings").exists():
            return
        before, wanted = _read(self._path("settings")), self._settings
        if changed := sorted(differing(before if isinstance(before, dict) else {}, wanted)):
            raise ArtifactError(
                f"{folder} was begun with another {' and '.join(changed)}: remove it to begin anew, or go on with "
                f"the same settings"
            )

    def has(self, name: str) -> bool:
        """Tell if this value has been found."""
        return self._path(name).exists()

    def get(self, name: str, find: Callable[[], T]) -> T:
        """The JSON value of that name; found now, and kept, where it is not yet there."""
        path = self._path(name)
        if not path.exists():
            value = find()
            # Only now: settings under which nothing was found bind nobody.
            if not self.has("settings"):
                self._write(self._path("settings"), self._settings)
            self._write(path, value)
        found: T = _read(path)
        return found

    def drop(self) -> None:
        """Remove everything: nothing is left to be done."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved: a file that is there is whole.
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.rename(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}; remove its folder to begin anew") from error
