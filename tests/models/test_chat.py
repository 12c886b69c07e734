"""Chat templates: rendered as `transformers` renders them, in a sandbox, and refused with the reason."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import ArtifactError, RequestError
from steerserve.models import ChatTemplate, load_chat_template
from tests.models.test_tokenizer import learn

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
# In the manner of LLaDA's: the beginning of the text before the first turn, contents trimmed.
HEADERS = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
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
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chat(*contents: str, system: bool = False) -> list[dict[str, str]]:
    """A conversation whose turns alternate, the user's first."""
    roles = [*(["system"] if system else []), *(["user", "assistant"] * len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bpe")
    learn(folder, 260)
    return transformers.GPT2Tokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), unk_token="<unk>", **TOKENS
    )


CONTENTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["<b> & 'c'", " padded \n", "日本"])), min_size=1)


@pytest.mark.parametrize("source", [TURNS, HEADERS, OTHERS], ids=["turns", "headers", "others"])
@given(contents=CONTENTS, system=st.booleans(), opened=st.booleans())
def test_a_conversation_is_rendered_as_by_transformers(
    theirs: Any, source: str, contents: Sequence[str], system: bool, opened: bool
) -> None:
    messages = chat(*contents, system=system)
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=opened)
    assert ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=opened) == expected


def test_the_answers_turn_is_opened_unless_asked_otherwise() -> None:
    text = ChatTemplate(TURNS).render(chat("hi"))
    assert text == "<|im_start|>system\nBe of help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not ChatTemplate(TURNS).render(chat("hi"), add_generation_prompt=False).endswith("assistant\n")


def test_what_a_template_refuses_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="no role tool") as error:
        ChatTemplate(TURNS).render([{"role": "tool", "content": "x"}])
    assert error.value.param == "messages"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}]])
def test_messages_that_a_template_stumbles_over_are_the_requests_fault(messages: list[Mapping[str, Any]]) -> None:
    with pytest.raises(RequestError, match="chat template refuses these messages") as error:
        ChatTemplate(TURNS).render(messages)
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
def test_a_template_reaches_nothing_beyond_its_messages(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source).render(chat("hi"))


def test_messages_stay_as_they_are() -> None:
    messages = chat("hi")
    with pytest.raises(RequestError):
        ChatTemplate("{% for m in messages %}{{ m.update({'content': 'x'}) }}{% endfor %}").render(messages)
    assert messages == chat("hi")


def write(folder: Path, template: object = None, file: str | None = None, **config: object) -> Path:
    raw = config | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(raw), encoding="utf-8")
    if file is not None:
        (folder / "chat_template.jinja").write_text(file, encoding="utf-8")
    return folder


def rendered(folder: Path) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render([])


def test_a_template_is_found_where_it_may_stand(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    assert load_chat_template(write(tmp_path)) is None
    assert rendered(write(tmp_path, "one {{ bos_token }}", bos_token={"content": "<s>"})) == "one <s>"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert rendered(write(tmp_path, named)) == "three"
    assert load_chat_template(write(tmp_path, named[:1])) is None
    assert rendered(write(tmp_path, named, "four")) == "four"


@pytest.mark.parametrize(
    "template", [3, {"default": "x"}, ["x"], [{"name": "default"}], "{% for %}", "{{ x | nothing }}"]
)
def test_what_is_no_template_is_refused_at_start(tmp_path: Path, template: object) -> None:
    with pytest.raises(ArtifactError, match="chat.template") as error:
        load_chat_template(write(tmp_path, template))
    assert str(tmp_path) in str(error.value)


def test_the_year_is_the_present_one() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) in {str(datetime.now().year + i) for i in (-1, 0)}
