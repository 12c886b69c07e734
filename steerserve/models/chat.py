"""A model's chat template: messages to the one text that its chat was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerserve.errors import ArtifactError, RequestError
from steerserve.models.tokenizer import special_tokens, tokenizer_config

DEFAULT = "default"


class GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant said, for training; here its content is simply written."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements of the block, without the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template as `transformers` renders it, in a sandbox that can change nothing and call nothing unsafe."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """tokens: special tokens by role (`bos_token`, ...); raises ArtifactError where the source is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ArtifactError(f"the chat template cannot be read: {error}") from error
        self._tokens = dict(tokens or {})

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; raises RequestError where the template refuses it."""
        context = self._tokens | {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except Exception as error:  # a template is a program of its own, and may fail in any way on what it is given
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RequestError(f"the model's chat template refuses these messages: {reason}", "messages") from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder; None where it has none.

    `chat_template.jinja` comes before `chat_template` of `tokenizer_config.json`, as in `transformers`; of several
    named ones the one called default is taken.
    """
    file = folder / "chat_template.jinja"
    source: object = _text(file) if file.is_file() else tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):
        try:
            source = {one["name"]: one["template"] for one in source}.get(DEFAULT)
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"{folder}: chat_template is no list of named templates: {error!r}") from error
    if source is None:
        return None
    if not isinstance(source, str):
        raise ArtifactError(f"{folder}: chat_template must be text or a list of named texts, got {source!r}")
    try:
        return ChatTemplate(source, special_tokens(folder))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
