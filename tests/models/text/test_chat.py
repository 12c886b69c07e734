"""Chat templates: found where they may stand, rendered in a sandbox, and refused with the reason."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from steerserve.errors import ArtifactError, RequestError
from steerserve.models import ChatTemplate, find_chat_template, open_tokenizer
from tests import tiny

# In the manner of Qwen2's: a default system message, turns between marks, the answer's turn opened.
TURNS = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# What other templates lean on: blocks that leave no blank lines, loop controls, JSON, namespaces, training marks.
OTHERS = """{% set seen = namespace(users=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set seen.users = seen.users + 1 %}
  {% generation %}{{ message | tojson }}{% endgeneration %}
{{ message.content | tojson(indent=1) }} {{ eos_token }}{{ undefined_name }}
{% endfor %}
{{ seen.users }}{{ 'tools' if tools else 'none' }} {{ range(3) | list }} {{ strftime_now('%Y') }}"""


def chat(*contents: str, system: bool = False) -> list[dict[str, str]]:
    """A conversation whose turns alternate, the user's first."""
    roles = [*(["system"] if system else []), *(["user", "assistant"] * len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer as `transformers` has it, with a beginning and an end, and no template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "[CLS]", "eos_token": "[SEP]"}')
    return open_tokenizer(folder)[1]


Render = Callable[..., str]


@pytest.fixture(scope="module")
def render(tokenizer: Any) -> Render:
    """Render a source of a template."""

    def rendered(source: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return ChatTemplate(tokenizer, source).render(messages, **options)

    return rendered


def test_templates_have_what_they_lean_on(render: Render) -> None:
    text = render(OTHERS, chat("be kind", "<b> & 'c'", "so", "a fourth", system=True))
    assert text == (
        """{"role": "user", "content": "<b> & 'c'"}"<b> & 'c'" [SEP]\n"""
        """{"role": "assistant", "content": "so"}"so" [SEP]\n"""
        f"2none [0, 1, 2] {datetime.now().year}"
    )


def test_the_answers_turn_is_opened_unless_asked_otherwise(render: Render) -> None:
    text = render(TURNS, chat("hi"))
    assert text == "<|im_start|>system\nBe of help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not render(TURNS, chat("hi"), add_generation_prompt=False).endswith("assistant\n")


def test_what_a_template_refuses_is_the_requests_fault(render: Render) -> None:
    with pytest.raises(RequestError, match="no role tool") as error:
        render(TURNS, [{"role": "tool", "content": "x"}])
    assert error.value.param == "messages"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}]])
def test_messages_that_a_template_stumbles_over_are_the_requests_fault(
    render: Render, messages: list[Mapping[str, Any]]
) -> None:
    with pytest.raises(RequestError, match="chat template refuses these messages") as error:
        render(TURNS, messages)
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_reaches_nothing_beyond_its_messages(render: Render, source: str) -> None:
    with pytest.raises(RequestError):
        render(source, chat("hi"))


def test_messages_stay_as_they_are(render: Render) -> None:
    messages = chat("hi")
    with pytest.raises(RequestError):
        render("{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}", messages)
    assert messages == chat("hi")


def write(folder: Path, template: object = None, file: str | bytes | None = None, **config: object) -> Path:
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    raw = config | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(raw), encoding="utf-8")
    if file is not None:
        (folder / "chat_template.jinja").write_bytes(file if isinstance(file, bytes) else file.encode())
    return folder


def found(folder: Path) -> ChatTemplate | None:
    return find_chat_template(folder, open_tokenizer(folder)[1])


def rendered(folder: Path) -> str:
    template = found(folder)
    assert template is not None
    return template.render(chat("hi"))


def test_a_template_is_found_where_it_may_stand(tmp_path: Path) -> None:
    assert found(write(tmp_path)) is None
    assert rendered(write(tmp_path, "one {{ bos_token }}", bos_token={"content": "[CLS]"})) == "one [CLS]"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert rendered(write(tmp_path, named)) == "three"
    assert rendered(write(tmp_path, {"default": "three"})) == "three"
    assert found(write(tmp_path, named[:1])) is None
    assert rendered(write(tmp_path, named, "four")) == "four"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    assert rendered(tmp_path) == "four"


def test_a_template_that_refuses_some_messages_serves_others(tmp_path: Path) -> None:
    source = "{% if messages | length < 3 %}{{ raise_exception('too few') }}{% endif %}{{ messages[2].content }}"
    template = found(write(tmp_path, source))
    assert template is not None
    assert template.render(chat("one", "two", "three")) == "three"
    with pytest.raises(RequestError, match="too few"):
        template.render(chat("one"))


@pytest.mark.parametrize(
    "template",
    [3, ["x"], [{"name": "default"}], {"default": 3}, "{% for %}", "{{ x | nothing }}", "{{ (" * 999],
)
def test_what_is_no_template_is_refused_at_start(tmp_path: Path, template: object) -> None:
    with pytest.raises(ArtifactError, match="chat.template") as error:
        found(write(tmp_path, template))
    assert str(tmp_path) in str(error.value)


def test_a_template_that_is_no_text_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja cannot be read"):
        found(write(tmp_path, file=b"\xff\xfe"))
