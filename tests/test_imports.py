"""Who may import whom: the layers of the architecture, read from the imports of every file."""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("steerserve", "schedulers")

# What each part may import of ours; a part that is not named (cli, commands, runtime, ...) may import all of it.
MAY_IMPORT = {
    "schedulers": {"schedulers"},
    "steerserve.errors": set(),
    "steerserve.config": {"steerserve.errors"},
    "steerserve.memory": set(),
    "steerserve.extras": {"steerserve.errors"},
    "steerserve.numerics": set(),
    "steerserve.digests": set(),
    "steerserve.pointers": {"steerserve.errors"},
    "steerserve.pickles": {"steerserve.digests", "steerserve.errors", "steerserve.pointers"},
    "steerserve.models": {
        "steerserve.models",
        "steerserve.pickles",
        "steerserve.pointers",
        "steerserve.digests",
        "steerserve.numerics",
        "steerserve.config",
        "steerserve.errors",
    },
    "steerserve.saes": {
        "steerserve.saes",
        "steerserve.pickles",
        "steerserve.pointers",
        "steerserve.digests",
        "steerserve.numerics",
        "steerserve.errors",
    },
    "steerserve.steering": {
        "steerserve.steering",
        "steerserve.saes",
        "steerserve.models",
        "steerserve.pointers",
        "steerserve.extras",
        "steerserve.numerics",
        "steerserve.errors",
    },
    "steerserve.engine": {
        "steerserve.engine",
        "steerserve.steering",
        "steerserve.saes",
        "steerserve.models",
        "steerserve.numerics",
        "steerserve.config",
        "steerserve.errors",
        "schedulers",
    },
    "steerserve.batch": {"steerserve.batch", "steerserve.errors"},
    "steerserve.server": {
        "steerserve.server",
        "steerserve.engine.api",
        "steerserve.steering.names",
        "steerserve.config",
        "steerserve.extras",
        "steerserve.errors",
    },
}

# Inside a package: the parts of a line may import those of the lines above it, and themselves.
LEVELS = {
    "steerserve.models": [
        {"memory", "sigma", "attention", "capture", "state_dict", "pretrained"},
        {"base", "llama"},
        {"means", "layers", "losses"},
        {"decoder"},
        {"experts"},
        {"families"},
        {"checkpoint"},
        {"text"},
        {"loader"},
    ],
    "steerserve.calibrate": [
        {"recipes", "texts"},
        {"generation", "provenance", "summary"},
        {"features", "probes"},
        {"trials"},
        {"preflight"},
        {"profile"},
        {"run"},
    ],
    "steerserve.engine": [
        {"api", "noise"},
        {"request"},
        {"admission", "forward"},
        {"sampling", "batching"},
        {"outputs", "runners"},
        {"feedback"},
        {"prompt_scoring"},
        {"engine"},
        {"features"},
        {"effects"},
        {"vllm"},
    ],
    "steerserve.server": [
        {"errors", "service"},
        {"protocol", "telemetry"},
        {"rows", "http", "worker", "fleet"},
        {"auth", "answers"},
        {"generation"},
        {"routes"},
        {"watch", "agent_check"},
        {"reload"},
        {"app", "process"},
    ],
}
NEVER = {
    "steerserve.batch": {"torch", "numpy", "fastapi", "starlette"},
    "steerserve.server": {"torch", "numpy", "safetensors", "tokenizers", "transformers"},
    "steerserve.engine": {"fastapi", "pydantic", "prometheus_client", "starlette", "uvicorn"},
    "steerserve.train": {"steerserve.server", "fastapi"},
    "steerserve.calibrate": {"steerserve.server", "fastapi"},
    "steerserve.label": {"steerserve.server", "fastapi"},
}
USERS_OF_RECIPES = ("steerserve.commands", "steerserve.train", "steerserve.calibrate", "steerserve.label")
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "pydantic_core": "pydantic",
    "opentelemetry": "opentelemetry-sdk",
    "yaml": "pyyaml",
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module a file imports, wherever in the file; for `from package import name`, also `package.name`."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if (ROOT / Path(*name.split("."))).with_suffix(".py").exists()]
            yield from found or [node.module]


def is_third_party(module: str) -> bool:
    top = module.split(".")[0]
    return top not in sys.stdlib_module_names and not (ROOT / top).exists()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_the_parts_below_it(part: str) -> None:
    for path in sources(*OURS):
        if within(module_of(path), part):
            for module in imports(path):
                if module.split(".")[0] in OURS:
                    assert any(within(module, allowed) for allowed in MAY_IMPORT[part]), f"{path} imports {module}"


@pytest.mark.parametrize("package", LEVELS)
def test_a_folder_imports_only_the_folders_below_it(package: str) -> None:
    level = {part: height for height, parts in enumerate(LEVELS[package]) for part in parts}
    depth = len(package.split("."))
    for path in sources("steerserve"):
        if not within(module_of(path), package) or module_of(path) == package:
            continue
        part = module_of(path).split(".")[depth]
        assert part in level, f"{path} is in no part of {package}"
        for module in imports(path):
            if within(module, package) and module != package:
                other = module.split(".")[depth]
                assert other == part or level[other] < level[part], f"{path} imports {module}"


@pytest.mark.parametrize("part", NEVER)
def test_a_part_never_imports_what_belongs_elsewhere(part: str) -> None:
    for path in sources(*OURS):
        if within(module_of(path), part):
            for module in imports(path):
                assert not any(within(module, banned) for banned in NEVER[part]), f"{path} imports {module}"


def test_schedulers_need_only_torch() -> None:
    third_party = {module.split(".")[0] for path in sources("schedulers") for module in imports(path)} - {"schedulers"}
    assert {module for module in third_party if is_third_party(module)} <= {"torch"}


def test_only_commands_and_recipes_use_recipes() -> None:
    for path in sources(*OURS):
        if not any(within(module_of(path), user) for user in USERS_OF_RECIPES):
            for module in imports(path):
                assert not within(module, "steerserve.train"), f"{path} imports {module}"
                assert not within(module, "steerserve.calibrate"), f"{path} imports {module}"
                assert not within(module, "steerserve.label"), f"{path} imports {module}"


def test_every_folder_with_code_is_a_package() -> None:
    assert {path.parent for path in sources(*OURS)} == {
        path.parent for path in sources(*OURS) if path.stem == "__init__"
    }


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!\[ ]", requirement)[0] for requirement in requirements}

    installed = names(project["dependencies"])
    for folders, declared in {
        ("steerserve", "schedulers"): installed
        | names(extras["train"])
        | names(extras["gguf"])
        | names(extras["otel"])
        | names(extras["fleet"])
        | names(extras["vllm"]),
        ("tests", "bench"): installed | names(extras["dev"]) | names(extras["train"]),
    }.items():
        for path in sources(*folders):
            for module in filter(is_third_party, imports(path)):
                top = module.split(".")[0]
                assert DISTRIBUTIONS.get(top, top.replace("_", "-")) in declared, f"{path} imports {module}"


def test_constraints_pin_what_is_installed_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: extra for name, extra in project["optional-dependencies"].items() if "vllm" not in name}
    wanted = {*project["dependencies"], *(r for extra in extras.values() for r in extra)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert pins == {re.split(r"[<>=]", requirement)[0] for requirement in wanted}


def test_importing_the_server_loads_no_torch() -> None:
    code = "import sys, steerserve.server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_transformers_is_loaded_with_a_model_only() -> None:
    """Importing it takes a second: neither a library of schedules, a command's help nor an app pays for it."""
    building = "import schedulers, steerserve, steerserve.cli, steerserve.runtime.load, steerserve.engine.engine"
    code = f"""
        import sys
        {building}, steerserve.calibrate.run
        from steerserve.models import load_tokenizer
        from steerserve.config import ServerConfig
        from steerserve.server.app import create_app
        from tests.server.text_engine import TextEngine, service_of

        create_app(service_of(TextEngine()), ServerConfig())
        assert "transformers" not in sys.modules, "before a model is loaded"
        load_tokenizer(steerserve.runtime.load.BUNDLED / "model")
        assert "transformers" in sys.modules, "with a model"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
