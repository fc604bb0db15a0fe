"""Owns the speeches: the two plays read from disk as (speaker, text) pairs, and their split."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

STAGE = "STAGE"
AUTHOR = "SHAW"
OPENING, CLOSING = "PREFACE TO PYGMALION.", "End of the Project Gutenberg"
SEQUEL_OPENING = "The rest of the story"
SPEAKER = re.compile(r"^((?:MRS\. )?[A-Z][A-Z'-]*(?: [A-Z][A-Z'-]+)*)(?:\. |\.$| (?=\[))")
BLOCK_SPEECHES = 36


@dataclass(frozen=True)
class Speech:
    """One speech of a play: the speaker's name and what is said."""

    name: str
    text: str

    @property
    def rendered(self) -> str:
        """The speech as the model sees it, between the speech and the end token."""
        return f"{self.name}:\n{self.text}"


Run = list[Speech]
"""Consecutive speeches of one play, in the order of the play."""


@dataclass(frozen=True)
class Split:
    """Runs of consecutive speeches to train on and to hold out."""

    train: list[Run]
    held_out: list[Run]


def read_shakespeare(path: Path) -> Run:
    """Read blocks of the form `Name:` newline verse lines; the line breaks are kept."""
    speeches: Run = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        name, _, text = block.strip().partition(":\n")
        if text.strip():
            speeches.append(Speech(name.strip(), text.strip()))
    return speeches


def read_shaw(path: Path) -> Run:
    """Read `NAME. text` paragraphs; narration is the stage's, preface and sequel the author's."""
    body = path.read_text(encoding="utf-8").partition(OPENING)[2].partition(CLOSING)[0]
    narrator, speeches = AUTHOR, Run()
    for paragraph in re.split(r"\n\s*\n", body):
        text = " ".join(paragraph.replace("_", "").split())
        if text.startswith("ACT "):
            narrator = STAGE
        elif text.startswith(SEQUEL_OPENING):
            narrator = AUTHOR
        found = None if narrator == AUTHOR else SPEAKER.match(text)
        said = text[found.end() :] if found else text
        if said and not said.startswith("ACT "):
            speeches.append(Speech(found.group(1) if found else narrator, said))
    return speeches


def read_plays(folder: Path) -> list[Run]:
    """Read both plays; one list of consecutive speeches for each."""
    return [
        read_shakespeare(folder / "tinyshakespeare.txt"),
        read_shaw(folder / "pygmalion_shaw.txt"),
    ]


def split_plays(plays: list[Run], share: float, seed: int) -> Split:
    """Hold out whole blocks of consecutive speeches, `share` of all blocks of each play."""
    dice = random.Random(seed)  # noqa: S311 - a reproducible split, no secret
    split = Split(train=[], held_out=[])
    for play in plays:
        blocks = [play[i : i + BLOCK_SPEECHES] for i in range(0, len(play), BLOCK_SPEECHES)]
        chosen = set(dice.sample(range(len(blocks)), max(1, round(share * len(blocks)))))
        joined: Run = []
        for index, block in enumerate(blocks):
            if index not in chosen:
                joined = joined + block
                continue
            split.held_out.append(block)
            if joined:
                split.train.append(joined)
            joined = []
        if joined:
            split.train.append(joined)
    return split
