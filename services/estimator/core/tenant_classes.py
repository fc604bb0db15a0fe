"""The predictor `tenant-classes`: the median of the latest outputs of a tenant's like prompts.

An example, and useful where tenants are applications: one that summarises and one that chats have
prompts of the same length and outputs that differ. Prompts are alike within a factor of two.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from shared.messages import Finished

KEPT = 64
"""Outputs remembered of each class."""
ENOUGH = 8
"""With fewer than this nothing is said."""
CLASSES_MAX = 4_096
"""The class that was silent longest is forgotten first."""

Key = tuple[str, str, str, int]


class Asked(Protocol):
    """See `services.estimator.predictor.Asked`."""

    @property
    def model(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def prompt(self) -> Sequence[int]: ...


class TenantClasses:
    """Classes by model, endpoint, tenant and prompt length."""

    def __init__(self) -> None:
        self._classes: OrderedDict[Key, deque[int]] = OrderedDict()

    def predict(self, asked: Asked) -> int | None:
        """The median; None where too little is known."""
        prompt_tokens = len(asked.prompt)
        known = self._classes.get(_key(asked.model, asked.endpoint, asked.tenant, prompt_tokens))
        if known is None or len(known) < ENOUGH:
            return None
        return sorted(known)[len(known) // 2]

    def learn(self, finished: Finished) -> None:
        """Of requests that ended by themselves or at their limit."""
        if finished.reason not in ("stop", "length"):
            return
        key = _key(finished.model, finished.endpoint, finished.tenant, finished.prompt_tokens)
        self._classes.setdefault(key, deque(maxlen=KEPT)).append(finished.output_tokens)
        self._classes.move_to_end(key)
        if len(self._classes) > CLASSES_MAX:
            self._classes.popitem(last=False)


def _key(model: str, endpoint: str, tenant: str, prompt_tokens: int) -> Key:
    return model, endpoint, tenant, prompt_tokens.bit_length()
