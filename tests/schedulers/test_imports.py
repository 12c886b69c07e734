"""The package stands alone: torch and the standard library, nothing of steerserve."""

import ast
import subprocess
import sys
from pathlib import Path

import schedulers

ROOT = Path(schedulers.__file__).parent


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_every_file_imports_only_torch_and_the_standard_library() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 10
    allowed = set(sys.stdlib_module_names) | {"torch", "schedulers"}
    for path in files:
        assert imported_packages(path) <= allowed, path


def test_importing_it_loads_nothing_of_steerserve() -> None:
    script = "import sys, schedulers; sys.exit(any(name.split('.')[0] == 'steerserve' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, check=False).returncode == 0


def test_every_public_name_exists_once() -> None:
    assert len(set(schedulers.__all__)) == len(schedulers.__all__)
    for name in schedulers.__all__:
        assert hasattr(schedulers, name)
