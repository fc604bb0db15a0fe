"""What a checker is, and what it may know besides the messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    at: float
    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true whatever the messages say."""

    lengths: Mapping[str, int]
    """Request to the length at which the model ends it; its limit may come before."""
    calm: bool = True
    """Messages came once and in order, and nobody died. Then nothing may be sent twice, and
    memory may not be promised twice even for a moment."""
    waiting_max_s: float = float("inf")
    """No request may wait longer for its next slice, nor a placed one for a word of its worker."""


Tell = Callable[[float, str], None]


class Checker:
    """One promise. `rule` names it."""

    rule = ""

    def __init__(self, facts: Facts, tell: Tell) -> None:
        self.facts, self.tell = facts, tell

    def see(self, at: float, moment: str, message: object) -> None:
        """The next line of the transcript."""

    def end(self, at: float) -> None:
        """There are no more."""
