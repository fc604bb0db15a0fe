"""Request parameters that both endpoints share, with their limits and what is not supported.

Names and meanings are OpenAI's; the second half is what vLLM added and load generators send.
Unknown fields are ignored. Known ones that would change the answer, and that no engine here
honours, are refused: silence would be a wrong answer.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from services.gateway.errors import ApiError, invalid, unsupported
from shared.messages import Sampling

CHOICES_MAX = 16
"""`n`: each choice is a request of its own."""
REQUESTS_MAX = 64
"""Prompts times n of one call."""
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
LOGPROBS_MAX = 20
BIASES_MAX = 1_024
IDS_MAX = 1_024
"""Stop tokens and the like."""
TOKEN_ID_MAX = 2**31 - 1
SEED_BITS = 63

TokenId = Annotated[int, Field(ge=0, le=TOKEN_ID_MAX)]
Stop = Annotated[str, Field(max_length=STOP_CHARACTERS_MAX)]


def default_for_null(default: Any) -> BeforeValidator:
    """OpenAI's schemas call most parameters nullable: null means the default."""
    return BeforeValidator(lambda value: default if value is None else value)


class Body(BaseModel):
    """The base of all request bodies: strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="One more chunk before [DONE] with the usage of the request."
    )
    continuous_usage_stats: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="Usage so far in every chunk (vLLM)."
    )


class Parameters(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    model: str = Field(max_length=512, description="Name of the served model; see /v1/models.")
    stream: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="Answer with server-sent events."
    )
    stream_options: StreamOptions | None = Field(
        default=None, description="Only with `stream: true`."
    )
    n: Annotated[int, default_for_null(1)] = Field(
        default=1, ge=1, le=CHOICES_MAX, description="Choices per prompt."
    )
    temperature: Annotated[float, default_for_null(1.0)] = Field(default=1.0, ge=0.0, le=2.0)
    top_p: Annotated[float, default_for_null(1.0)] = Field(default=1.0, gt=0.0, le=1.0)
    presence_penalty: Annotated[float, default_for_null(0.0)] = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: Annotated[float, default_for_null(0.0)] = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(
        default=None,
        max_length=BIASES_MAX,
        description="Token id (as a string) to a bias from -100 to 100.",
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**SEED_BITS),
        lt=2**SEED_BITS,
        description="Same seed and parameters, same text. Drawn if missing.",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = Field(
        default=None, description="The text ends before the first of these strings."
    )
    user: str | None = Field(default=None, max_length=512, description="Accepted, not used.")

    top_k: Annotated[int, default_for_null(0)] = Field(
        default=0, ge=-1, le=TOKEN_ID_MAX, description="0 or -1: no limit."
    )
    min_p: Annotated[float, default_for_null(0.0)] = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: Annotated[float, default_for_null(1.0)] = Field(
        default=1.0, ge=0.01, le=10.0
    )
    min_tokens: Annotated[int, default_for_null(0)] = Field(
        default=0, ge=0, le=TOKEN_ID_MAX, description="No end before so many output tokens."
    )
    ignore_eos: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="Go on to max_tokens whatever the model says (benchmarks)."
    )
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=IDS_MAX)
    include_stop_str_in_output: Annotated[bool, default_for_null(False)] = False
    skip_special_tokens: Annotated[bool, default_for_null(True)] = True
    allowed_token_ids: list[TokenId] | None = Field(default=None, max_length=IDS_MAX)
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=TOKEN_ID_MAX,
        description="Keep the last so many prompt tokens; -1: as many as fit.",
    )
    priority: Annotated[int, default_for_null(0)] = Field(
        default=0, ge=-(2**31), lt=2**31, description="Lower is served first."
    )
    predicted_output_tokens: int | None = Field(
        default=None,
        ge=1,
        le=TOKEN_ID_MAX,
        description="Your guess of the output's length: a hint for policies that use "
        "it (`tranche`); it cuts nothing.",
    )
    request_id: str | None = Field(
        default=None, max_length=128, description="Used in the answer's id and in logs."
    )
    return_token_ids: Annotated[bool, default_for_null(False)] = Field(
        default=False, description="Output token ids beside the text."
    )
    best_of: int | None = Field(default=None, description="Only equal to n.")
    tools: Any = Field(default=None, description="Not supported.")
    tool_choice: Any = Field(default=None, description="Only `none` and `auto`.")
    functions: Any = Field(default=None, description="Not supported.")
    response_format: Any = Field(default=None, description='Only {"type": "text"}.')
    prompt_logprobs: Any = Field(default=None, description="Not supported; see `echo`.")
    bad_words: Any = Field(default=None, description="Not supported.")
    use_beam_search: Any = Field(default=None, description="Not supported.")
    structured_outputs: Any = Field(default=None, description="Not supported.")
    guided_json: Any = Field(default=None, description="Not supported.")
    guided_regex: Any = Field(default=None, description="Not supported.")
    guided_choice: Any = Field(default=None, description="Not supported.")
    guided_grammar: Any = Field(default=None, description="Not supported.")

    @property
    def stops(self) -> list[str]:
        """The stop strings, without empty ones."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        if self.stream_options is not None and not self.stream:
            raise invalid("'stream_options' needs 'stream': true.", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported("best_of", "leave it out or make it equal to 'n'")
        if self.tool_choice not in (None, "none", "auto"):
            raise unsupported("tool_choice")
        if self.response_format not in (None, {"type": "text"}):
            raise unsupported("response_format", "only the type 'text' is")
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise unsupported(name)

    def sampling(
        self, seed: int, vocabulary_size: int, *, logprobs: int | None, prompt_logprobs: bool
    ) -> Sampling:
        """How the workers shall choose tokens. Raises ApiError for token ids that do not exist."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias or {}, vocabulary_size),
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=_known("stop_token_ids", self.stop_token_ids, vocabulary_size),
            allowed_token_ids=_known("allowed_token_ids", self.allowed_token_ids, vocabulary_size),
        )


UNSUPPORTED = (
    "tools",
    "functions",
    "prompt_logprobs",
    "bad_words",
    "use_beam_search",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def _known(name: str, ids: list[int] | None, vocabulary_size: int) -> tuple[int, ...]:
    for token_id in ids or ():
        if token_id >= vocabulary_size:
            raise _unknown_token(name, token_id, vocabulary_size)
    return tuple(ids or ())


def _biases(given: dict[str, float], vocabulary_size: int) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(TOKEN_ID_MAX))):
            raise invalid(f"'logit_bias' has {key[:20]!r} where a token id belongs.", "logit_bias")
        if int(key) >= vocabulary_size:
            raise _unknown_token("logit_bias", int(key), vocabulary_size)
        biases[int(key)] = bias
    return biases


def _unknown_token(name: str, token_id: int, vocabulary_size: int) -> ApiError:
    return invalid(
        f"'{name}' has the token id {token_id}; this model's ids are below {vocabulary_size}.",
        name,
    )
