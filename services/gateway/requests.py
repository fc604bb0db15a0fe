"""Bodies of the two generating endpoints."""

from typing import Annotated, Any, Literal

from pydantic import Field

from services.gateway.errors import invalid, unsupported
from services.gateway.parameters import (
    LOGPROBS_MAX,
    REQUESTS_MAX,
    TOKEN_ID_MAX,
    Body,
    Parameters,
    TokenId,
    default_for_null,
)

MESSAGES_MAX = 2_048
PARTS_MAX = 256
COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""


class CompletionRequest(Parameters):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=REQUESTS_MAX)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=REQUESTS_MAX),
        ]
    ) = Field(description="A text, several texts, token ids, or several lists of token ids.")
    max_tokens: Annotated[int, default_for_null(COMPLETION_TOKENS)] = Field(
        default=COMPLETION_TOKENS, ge=0, le=TOKEN_ID_MAX, description="0 only with `echo`."
    )
    echo: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="The prompt before the completion."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=LOGPROBS_MAX, description="Most likely tokens to list per token."
    )
    suffix: str | None = Field(default=None, description="Not supported.")

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        super().check()
        if self.suffix:
            raise unsupported("suffix")
        if self.max_tokens < 1 and not self.echo:
            raise invalid("'max_tokens' must be at least 1 without 'echo'.", "max_tokens")


class ContentPart(Body):
    """A part of a message; only text can be served."""

    type: str = Field(description="Only `text`.")
    text: str | None = None


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=PARTS_MAX)] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Any = Field(default=None, description="Not supported.")
    tool_call_id: str | None = None

    def plain(self, index: int) -> dict[str, Any]:
        """As chat templates want it. Raises ApiError for anything but text."""
        param = f"messages[{index}]"
        if self.tool_calls:
            raise unsupported(f"{param}.tool_calls")
        if self.content is None and self.role != "assistant":
            raise invalid(f"'{param}.content' is missing.", f"{param}.content")
        content = self.content or ""
        if not isinstance(content, str):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise invalid(
                        f"'{param}.content' has a part of type {part.type[:40]!r}; this model "
                        "reads text only.",
                        f"{param}.content",
                        "unsupported_content",
                    )
            content = "\n".join(part.text or "" for part in content)
        message = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(Parameters):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MESSAGES_MAX)
    max_tokens: int | None = Field(
        default=None, ge=1, le=TOKEN_ID_MAX, description="Older name of max_completion_tokens."
    )
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=TOKEN_ID_MAX,
        description="Most output tokens; default: what the context leaves.",
    )
    logprobs: Annotated[bool, default_for_null(False)] = False
    top_logprobs: int | None = Field(
        default=None, ge=0, le=LOGPROBS_MAX, description="Needs `logprobs: true`."
    )
    echo: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="The last message before the answer (vLLM)."
    )
    add_generation_prompt: Annotated[bool, default_for_null(True)] = True
    continue_final_message: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="Go on inside the last message; add_generation_prompt: false."
    )
    chat_template: str | None = Field(default=None, description="Not supported.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="More variables for the chat template."
    )
    documents: Any = Field(default=None, description="Not supported.")
    modalities: Any = Field(default=None, description='Only ["text"].')
    audio: Any = Field(default=None, description="Not supported.")

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "'continue_final_message' needs 'add_generation_prompt': false.",
                "continue_final_message",
            )
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities")
        for name in ("chat_template", "documents", "audio"):
            if getattr(self, name):
                raise unsupported(name)

    @property
    def output_tokens_max(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens
