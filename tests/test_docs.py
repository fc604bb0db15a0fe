"""The documents: links resolve, commands and flags exist, examples can be parsed."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from deploy.setup import documents
from services.cli import COMMANDS
from services.mesh import BANNER

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\btranche ([a-z]+)((?:[ \n\\]+[^`\n|;&#]*)?)")


def code_blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    found = CODE_BLOCK.findall(document.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def shell_commands(document: Path) -> list[list[str]]:
    """All command lines in `sh` blocks, split as a shell would."""
    lines = [
        line
        for block in code_blocks(document, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that `tranche <command> --help` lists."""
    arguments = [sys.executable, "-m", "services", command, "--help"]
    shown = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", shown.stdout))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for match in LINK.finditer(document.read_text(encoding="utf-8")):
        target = match[1] or match[2]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        goal = (document.parent / name).resolve() if name else document
        assert goal.exists(), f"{document.name}: {target}"
        if anchor and goal.suffix == ".md":
            assert anchor in anchors(goal), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, made as code hosts make them."""
    text = CODE_BLOCK.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    cleaned = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in cleaned}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_flags_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    code = [*re.findall(r"`([^`\n]+)`", text), *(block for _, block in CODE_BLOCK.findall(text))]
    for command, rest in (found for part in code for found in COMMAND.findall(part)):
        assert command in COMMANDS, f"{document.name}: tranche {command}"
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest)) - flags_of(command)
        assert not unknown, f"{document.name}: tranche {command} has no {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)[^`]*`", text))
    named |= {words[1] for words in shell_commands(document) if words[0] == "make"}
    assert named <= targets


def test_curl_examples_of_the_readme_send_json() -> None:
    bodies = [
        words[words.index("-d") + 1]
        for words in shell_commands(ROOT / "README.md")
        if words[0] == "curl" and "-d" in words
    ]
    assert bodies
    for body in bodies:
        assert json.loads(body)["model"]


def test_readme_and_banner_show_the_same_curl_first() -> None:
    fields = dict.fromkeys(("policy", "engine", "workers", "bus"), "")
    banner = BANNER.format(url="http://127.0.0.1:8000", seconds=1, model="demo_model", **fields)
    shown = [
        re.findall(r"^ *(curl .*\\\n.*)$", text, re.MULTILINE)
        for text in (banner, (ROOT / "README.md").read_text(encoding="utf-8"))
    ]
    assert len(shown[0]) == 1
    assert [shlex.split(command.replace("\\\n", " ")) for command in shown[0]] == [
        shlex.split(command.replace("\\\n", " ")) for command in shown[1][:1]
    ]


def test_glossary_is_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^- \*\*(.+?)\*\*:", text, re.MULTILINE)
    assert len(terms) > 10
    assert terms == sorted(terms, key=str.casefold)


def test_settings_are_all_in_the_help() -> None:
    for service in ("gateway", "scheduler", "estimator", "worker"):
        from services.process import settings_class

        kind = settings_class(service)
        wanted = {f"--{name.replace('_', '-')}" for name in kind.model_fields}
        assert wanted <= flags_of(service)


def test_generated_documents_are_up_to_date() -> None:
    assert list(documents.stale_pages()) == [], "run: make docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_metrics_exist(document: Path) -> None:
    listed = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    text = document.read_text(encoding="utf-8")
    names = re.findall(
        r"`(tranche_\w+_(?:total|seconds|tokens|bytes|requests|ratio|workers))`", text
    )
    assert [name for name in names if f"`{name}`" not in listed] == []
