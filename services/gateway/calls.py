"""A call: one HTTP request with all its choices, from the submission to the last delta.

The mesh's side adds tokens and errors and sets `changed`; the client's side takes what is new.
Neither waits for the other.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.gateway.core.transcript import Transcript
from services.gateway.errors import ApiError
from services.gateway.prompts import Prompt
from shared.messages import RequestSpec, TokenLogprobs

Endpoint = Literal["completions", "chat"]


@dataclass(slots=True)
class Choice:
    """One choice: a request of the mesh, and its text."""

    index: int
    spec: RequestSpec
    prompt: Prompt
    transcript: Transcript
    hidden: bool = False
    """Only the prompt was asked for (`echo` with `max_tokens` 0): one token is made, to have the
    prompt scored, and not shown."""
    prompt_scores: Sequence[TokenLogprobs] = ()
    promise: tuple[float, float] | None = None
    """Monotonic: when the mesh expects its first and its last token."""
    paused_at_characters: int = 0
    """So much text waited when the mesh was last told that its client is behind; 0: it is not."""
    error: ApiError | None = None
    finished_at: float | None = None
    """Monotonic; when the mesh was done with it, for better or worse."""
    first_token_at: float | None = None
    last_token_at: float | None = None


@dataclass(slots=True)
class Call:
    """All choices of one HTTP request. Times are monotonic seconds unless they say otherwise."""

    call_id: str
    """Unique in the mesh; the choices' request ids begin with it."""
    answer_id: str
    """What the client sees as `id`."""
    http_id: str
    """What it sees as x-request-id."""
    endpoint: Endpoint
    model: str
    tenant: str
    created: int
    """Unix seconds, as in the answer."""
    received_at: float
    expires_at: float
    trace: str = ""
    choices: list[Choice] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; n choices of one prompt count it once."""
        seen = {id(choice.prompt): len(choice.prompt.ids) for choice in self.choices}
        return sum(seen.values())

    @property
    def output_tokens(self) -> int:
        """Of all choices so far."""
        return sum(choice.transcript.output_tokens for choice in self.choices)

    @property
    def promise(self) -> tuple[float, float] | None:
        """When the first token of any choice and the last one of all are expected, monotonic."""
        told = [choice.promise for choice in self.choices if choice.promise is not None]
        if not told:
            return None
        return min(start for start, _ in told), max(finish for _, finish in told)

    @property
    def promised(self) -> bool:
        """All choices were."""
        return all(choice.promise is not None for choice in self.choices)

    @property
    def begun(self) -> bool:
        """Some choice has tokens."""
        return any(choice.first_token_at is not None for choice in self.choices)

    @property
    def error(self) -> ApiError | None:
        """The first choice's error, if one failed."""
        return next((c.error for c in self.choices if c.error is not None), None)

    @property
    def finished(self) -> bool:
        """The mesh has nothing more to say."""
        return all(choice.finished_at is not None for choice in self.choices)
