"""The body of a chat completion, and the messages that a model's chat template is given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from steerserve.errors import RequestError
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Name, Strict
from steerserve.server.protocol.generation import MAX_ALTERNATIVES, GenerationRequest

Chat = Callable[[Sequence[Mapping[str, Any]]], str]
"""The prompt of a conversation, by a model's template."""


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Annotated[list[TextPart], Field(min_length=1, max_length=256)], Tag("<parts>")],
    Discriminator(
        fields.branch({str: "<text>", list: "<parts>"}),
        custom_error_type="content",
        custom_error_message='must be a string or a list of {"type": "text", "text": ...}',
    ),
]


class Message(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Name | None = None
    # What answers hold, here or elsewhere, beside their text: clients send an answer back whole, and what is empty in
    # it says nothing. First OpenAI's fields, then those of its client's helpers, of vLLM, OpenRouter and litellm.
    refusal: Annotated[Any, fields.neutral("")] = None
    annotations: Annotated[Any, fields.neutral([])] = None
    audio: Annotated[Any, fields.neutral({})] = None
    tool_calls: Annotated[Any, fields.neutral([])] = None
    function_call: Annotated[Any, fields.neutral({})] = None
    parsed: Annotated[Any, fields.neutral({})] = None
    reasoning: Annotated[Any, fields.neutral("")] = None
    reasoning_content: Annotated[Any, fields.neutral("")] = None
    reasoning_details: Annotated[Any, fields.neutral([])] = None
    thinking_blocks: Annotated[Any, fields.neutral([])] = None
    images: Annotated[Any, fields.neutral([])] = None
    provider_specific_fields: Annotated[Any, fields.neutral({}, {"refusal": None})] = None

    def plain(self) -> dict[str, Any]:
        """The message as templates take it: parts are lines of one text."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class ResponseFormat(Strict):
    """Nothing but text is written."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """A completion of a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    response_format: ResponseFormat | None = None
    tools: Annotated[Any, fields.neutral([])] = None
    tool_choice: Annotated[Any, fields.neutral("none", "auto")] = None
    functions: Annotated[Any, fields.neutral([])] = None
    function_call: Annotated[Any, fields.neutral("none", "auto")] = None
    modalities: Annotated[Any, fields.neutral(["text"])] = None
    store: Annotated[Any, fields.neutral(False)] = None
    metadata: Annotated[Any, fields.neutral({})] = None
    service_tier: Annotated[Any, fields.neutral("auto", "default")] = None

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives wanted for each token; None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    @model_validator(mode="after")
    def _alternatives_to_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fields.blame("top_logprobs", 'needs "logprobs": true')
        return self


def rendered(body: ChatRequest, chat: Chat | None) -> str:
    """The prompt of a conversation by the model's template; raises RequestError where it has none, or refuses."""
    if chat is None:
        raise RequestError("this model has no chat template; use /v1/completions", "messages")
    return chat([message.plain() for message in body.messages])
