"""What the Dockerfile promises: two stages, nobody's root, pinned, alive as /health says, and nothing to spare."""

import json
import re

import pytest

from steerserve.cli import build_parser
from tests.deploy.files import DEPLOY, ROOT, of_kind, rendered

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    """The instructions of each stage; those before the first FROM are left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word and found:
            found[-1].append((word, rest.strip()))
    return found


def value_of(stage: list[Instruction], word: str) -> str:
    """What the only instruction of a name says."""
    [value] = [rest for name, rest in stage if name == word]
    return value


def test_there_is_a_stage_to_build_and_one_to_run(stages: list[list[Instruction]]) -> None:
    build, final = stages
    assert [stage[0][1] for stage in stages] == ["${BASE} AS build", "${BASE}"]
    installs = re.compile(r"\b(pip|apt|apt-get|apk|gcc|make|curl|wget)\b")
    assert [rest for word, rest in build if word == "RUN" and "pip install" in rest]
    assert not [rest for word, rest in final if word == "RUN" and installs.search(rest)]
    assert [rest for word, rest in final if word in {"COPY", "ADD"}] == ["--from=build /opt/steerserve /opt/steerserve"]


def test_what_is_installed_is_pinned_and_not_compiled(stages: list[list[Instruction]]) -> None:
    build = stages[0]
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in rest for word, rest in build if word == "ENV")
    for line in (rest for word, rest in build if word == "RUN"):
        for install in re.findall(r"pip install [^&]*", line):
            assert "--only-binary :all:" in install or "--no-deps --no-build-isolation ." in install, install


def test_it_runs_as_the_user_that_the_chart_names(stages: list[list[Instruction]]) -> None:
    user = value_of(stages[1], "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    [deployment] = of_kind(rendered("default"), "Deployment")
    security = deployment["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"


def test_its_command_is_one_that_the_server_takes(stages: list[list[Instruction]]) -> None:
    final = stages[1]
    assert json.loads(value_of(final, "ENTRYPOINT")) == ["steerserve"]
    arguments = vars(build_parser().parse_args(json.loads(value_of(final, "CMD"))))
    assert arguments["ServerConfig.host"] == "0.0.0.0"
    assert value_of(final, "EXPOSE") == str(arguments["ServerConfig.port"])


def test_its_health_check_asks_the_port_it_serves(stages: list[list[Instruction]]) -> None:
    options, _, command = value_of(stages[1], "HEALTHCHECK").partition("CMD ")
    program = json.loads(command)
    assert program[:2] == ["python", "-c"]
    compile(program[2], "healthcheck", "exec")
    assert f"http://127.0.0.1:{value_of(stages[1], 'EXPOSE')}/health" in program[2]
    assert "--start-period=" in options


def test_it_is_labelled(stages: list[list[Instruction]]) -> None:
    labels = value_of(stages[1], "LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_only_what_is_copied_is_sent_to_the_builder(stages: list[list[Instruction]]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {source for word, rest in stages[0] if word == "COPY" for source in rest.split()[:-1]}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
