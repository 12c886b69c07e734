"""A model's chat template: messages to the one text that its chat was trained on, as `transformers` renders it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from steerserve.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT = "default"


class ChatTemplate:
    """The chat template of a tokenizer, rendered in the sandbox of `transformers`, which can change nothing and call
    nothing unsafe."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", source: str, variables: Mapping[str, Any] | None = None
    ) -> None:
        """variables: what it is rendered with beside the messages; raises ArtifactError where the source is no
        template."""
        self._tokenizer, self._source, self._variables = tokenizer, source, dict(variables or {})
        try:
            self._text([{"role": "user", "content": ""}])
        except (TemplateSyntaxError, RecursionError) as error:
            raise ArtifactError(f"the chat template cannot be read: {error}") from error
        except Exception:  # a template that refuses, or fails on, these messages may take others
            pass

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; raises RequestError where the template refuses it.

        A field of a message that is None is left out, as if it had not been given.
        """
        try:
            return self._text([dict(message) for message in messages], add_generation_prompt)
        except Exception as error:  # a template is a program of its own, and may fail in any way on what it is given
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RequestError(f"the model's chat template refuses these messages: {reason}", "messages") from error

    def _text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        )


def find_chat_template(
    folder: Path, tokenizer: "PreTrainedTokenizerFast", variables: Mapping[str, Any] | None = None
) -> ChatTemplate | None:
    """The chat template that `transformers` found beside a tokenizer; None where there is none.

    Of several named ones the one called default is taken. variables: see `ChatTemplate`.
    """
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get(DEFAULT)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ArtifactError(f"{folder}: chat_template must be text or a list of named texts, got {source!r}")
    try:
        return ChatTemplate(tokenizer, source, variables)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error
