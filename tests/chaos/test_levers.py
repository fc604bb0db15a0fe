"""A process whose clock and disk obey from outside."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.chaos.levers import Levers

PROGRAM = textwrap.dedent(
    """
    import sys, time, sqlite3
    from pathlib import Path
    from bench.chaos.levers import Levers, limit_disk, shift_clock

    levers = Levers(Path(sys.argv[1]))
    shift_clock(levers)
    limit_disk(levers)
    database = sqlite3.connect(sys.argv[2], isolation_level=None)
    database.execute("CREATE TABLE IF NOT EXISTS rows (text TEXT)")
    for line in sys.stdin:
        try:
            database.execute("INSERT INTO rows VALUES (?)", ("x" * 2000,))
            said = "stored"
        except sqlite3.OperationalError as error:
            said = str(error)
        print(time.time(), time.time_ns(), said, sep=",", flush=True)
    """
)


@pytest.fixture
def levers(tmp_path: Path) -> Levers:
    return Levers(tmp_path / "levers")


def test_clock_and_disk_obey_at_once_and_come_right_again(tmp_path: Path, levers: Levers) -> None:
    command = [sys.executable, "-c", PROGRAM, tmp_path / "levers", tmp_path / "history.sqlite"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> tuple[float, float, str]:
            process.stdin.write("now\n")  # type: ignore[union-attr]
            seconds, nanoseconds, said = process.stdout.readline().strip().split(",")  # type: ignore[union-attr]
            return float(seconds) - time.time(), float(nanoseconds) / 1e9 - time.time(), said

        assert ask() == (pytest.approx(0, abs=5), pytest.approx(0, abs=5), "stored")
        levers.set(ahead_s=-3600.0, disk_full=True)
        ahead = pytest.approx(-3600, abs=5)
        assert ask() == (ahead, ahead, "database or disk is full")
        levers.set(ahead_s=0.0, disk_full=False)
        assert ask() == (pytest.approx(0, abs=5), pytest.approx(0, abs=5), "stored")
        process.stdin.close()
        assert process.wait(20) == 0
