"""The file tree in docs/architecture.md: one line per source file, from the file's first line."""

import ast
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- file tree: begin (make docs) -->"
END = "<!-- file tree: end -->"
CODE_FOLDERS = ("services", "shared", "sim", "bench", "deploy", "tests")


def source_files() -> list[PurePosixPath]:
    """Python files that git knows, but for the empty `__init__.py`."""
    command = ["git", "ls-files", "--", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    paths = [PurePosixPath(line) for line in listed.stdout.splitlines()]
    return sorted(
        path
        for path in paths
        if path.name != "__init__.py" and path.parts[0] in CODE_FOLDERS and (ROOT / path).exists()
    )


def tree(paths: Iterable[PurePosixPath]) -> str:
    """Markdown: a heading per folder, a line per file."""
    parts = []
    for folder, files in groupby(sorted(paths, key=_folder_first), key=lambda path: path.parent):
        lines = [f"- `{path.name}`: {first_line(ROOT / path)}" for path in files]
        parts.append("\n".join([f"**`{folder}/`**", "", *lines]))
    return "\n\n".join(parts)


def first_line(path: Path) -> str:
    """What the file says it owns. Raises ValueError if it says nothing."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path.relative_to(ROOT)} has no first line that says what it owns")
    paragraph = docstring.split("\n\n")[0]
    return " ".join(paragraph.split())


def page() -> str:
    """The whole document, with a fresh tree between its two marks. Raises ValueError without."""
    text = tree(source_files())
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCUMENT} has lost its marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _folder_first(path: PurePosixPath) -> tuple[int, str, str]:
    return CODE_FOLDERS.index(path.parts[0]), str(path.parent), path.name
