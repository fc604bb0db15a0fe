"""The documents that are made from the code.

python -m deploy.setup.documents           # complain about those that are not up to date
python -m deploy.setup.documents --write   # bring them up to date
"""

import sys
from collections.abc import Callable
from pathlib import Path

from deploy.setup import (
    error_note,
    file_tree,
    metrics_page,
    policies_figures,
    policies_page,
    settings_page,
)

DOCS = Path(__file__).parents[2] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "architecture.md": file_tree.page,
    "metrics.md": metrics_page.page,
    "policies.md": policies_page.page,
    policies_figures.PICTURE: policies_figures.picture,
    "settings.md": settings_page.page,
    "simulation.md": error_note.page,
}


def main(arguments: list[str]) -> int:
    """Write or verify; the exit code is 1 if a document is stale."""
    stale = stale_pages()
    if "--write" in arguments:
        for name, text in stale.items():
            (DOCS / name).write_text(text, encoding="utf-8")
        return 0
    for name in stale:
        sys.stderr.write(f"docs/{name} does not match the code; run: make docs\n")
    return 1 if stale else 0


def stale_pages() -> dict[str, str]:
    """Documents that are not what the code says, with what they should be."""
    fresh = {name: page() for name, page in PAGES.items()}
    return {name: text for name, text in fresh.items() if _current(name) != text}


def _current(name: str) -> str:
    path = DOCS / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
