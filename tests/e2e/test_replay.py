"""A journal of a live mesh, replayed by the command: the same decisions, or those of another."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import live_mesh

ROOT = Path(__file__).parents[2]


def tranche_replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services", "replay", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("policy", "unlike"), [("past-future", "ils"), ("scls", "sls")])
def test_a_live_journal_replays_to_the_same_decisions(
    policy: str, unlike: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setenv("TRANCHE_SCHEDULER_JOURNAL", str(journal))
    with live_mesh(workers=2, slice_tokens=4, policy=policy) as mesh:
        ask_all(mesh.url, [Question((1, 5, number), 20) for number in range(6, 18)])
    same = tranche_replay(str(journal))
    assert same.returncode == 0, same.stderr
    assert "every decision the same" in same.stdout
    assert int(same.stdout.split()[0]) >= 20
    other = tranche_replay(str(journal), "--policy", unlike)
    assert other.returncode == 3, other.stderr
    assert "RunSlice" in other.stdout


def test_what_is_no_journal_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a journal at all")
    wrong = tranche_replay(str(tmp_path / "text"))
    assert wrong.returncode == 1
    assert "no journal" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    missing = tranche_replay(str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
