"""The store over real SQLite files: restarts, kills, repeats, bounds, damage, strangers' files."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from services.estimator.core.history import MODELS_MAX
from services.estimator.settings import EstimatorSettings
from services.estimator.store import IN_MEMORY, PRUNE_EVERY, HistoryStore, open_store
from shared.config import SetupError
from tests.estimator.reports import report

NOW = 1_790_000_000.0
ROWS = 5_000


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "deep" / "history.sqlite")


def opened(database: str, rows_max: int = ROWS) -> HistoryStore:
    store, moved = open_store(database, rows_max, NOW)
    assert moved is None
    return store


def test_what_was_stored_is_there_after_a_restart(database: str) -> None:
    store = opened(database)
    told = [
        report(1, 30, tenant="t", endpoint="chat", epoch=7, prompt_tokens=3, max_tokens=31),
        report(2, 100, reason="length"),
        report(3, reason="cancelled"),
        report(4, 5, model="other"),
    ]
    assert all(store.add(one, NOW) for one in told)
    store.close()
    again = opened(database)
    assert again.recent(window=10) == [told[0], told[1], told[3]]
    assert again.totals() == {
        ("demo", "stop"): 1,
        ("demo", "length"): 1,
        ("demo", "cancelled"): 1,
        ("other", "stop"): 1,
    }
    assert not again.add(told[0], NOW)
    again.close()


def test_a_repeat_is_stored_once_even_if_it_says_something_else(database: str) -> None:
    store = opened(database)
    assert store.add(report(1, 30), NOW)
    assert not store.add(report(1, 31, reason="length"), NOW)
    assert store.count() == 1
    assert store.totals() == {("demo", "stop"): 1}
    store.close()


def test_the_window_counts_lengths_per_model_oldest_first(database: str) -> None:
    store = opened(database)
    for number in range(20):
        reason = "cancelled" if number % 5 == 0 else "stop"
        store.add(report(number, number, model="ab"[number % 2], reason=reason), NOW)
    rows = store.recent(window=3)
    assert [row.output_tokens for row in rows] == [13, 14, 16, 17, 18, 19]
    store.close()


def test_only_the_latest_models_are_loaded(database: str) -> None:
    store = opened(database)
    for number in range(MODELS_MAX + 5):
        store.add(report(number, model=f"m{number}"), NOW)
    models = [row.model for row in store.recent(window=3)]
    assert models == [f"m{number}" for number in range(5, MODELS_MAX + 5)]
    store.close()


def test_rows_are_pruned_and_totals_are_not() -> None:
    store = opened(IN_MEMORY, rows_max=1_000)
    store.add(report(0, model="long ago"), NOW)
    for number in range(1, 3 * PRUNE_EVERY):
        store.add(report(number), NOW)
        assert store.count() <= 1_000 + PRUNE_EVERY
    assert store.totals() == {("demo", "stop"): 3 * PRUNE_EVERY - 1}
    store.close()


CHILD = """
import sys
from services.estimator.store import open_store
from tests.estimator.reports import report
store, _ = open_store(sys.argv[1], 5_000, 0.0)
for number in range(10**6):
    assert store.add(report(number, number), 0.0)
    print(number, flush=True)
"""


def test_a_killed_process_loses_nothing_it_had_acknowledged(database: str) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, database], stdout=subprocess.PIPE, cwd=root, text=True
    ) as child:
        assert child.stdout is not None
        acknowledged = 0
        for line in child.stdout:
            acknowledged = int(line) + 1
            if acknowledged == 200:
                child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    store = opened(database)
    assert acknowledged >= 200
    assert acknowledged <= store.count() <= acknowledged + 1
    store.close()


def damage_all(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 500)


def damage_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))


def damage_the_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_the_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE totals")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("damage", [damage_all, damage_a_page, damage_the_end, damage_the_tables])
def test_a_damaged_file_is_moved_aside_and_kept(database: str, damage: object) -> None:
    store = opened(database)
    for number in range(300):
        store.add(report(number), NOW)
    store.close()
    assert callable(damage)
    damage(Path(database))
    broken = Path(database).read_bytes()
    store, moved = open_store(database, ROWS, NOW)
    assert moved is not None
    assert moved.name == "history.sqlite.corrupt-20260921T141320Z"
    assert moved.read_bytes()[100:] == broken[100:]
    assert store.count() == 0
    assert store.add(report(1), NOW)
    store.close()


def test_somebody_elses_database_is_left_alone(database: str) -> None:
    path = Path(database)
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    with pytest.raises(SetupError, match="database of something else; choose another --database"):
        open_store(database, ROWS, NOW)
    assert [entry.name for entry in path.parent.iterdir()] == ["history.sqlite"]


def test_a_newer_schema_is_left_alone(database: str) -> None:
    opened(database).close()
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(SetupError, match="has schema 2; this version knows 1"):
        open_store(database, ROWS, NOW)


@pytest.mark.parametrize("name", ["a-folder", "a-file/history.sqlite"])
def test_a_path_that_cannot_be_used_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").touch()
    with pytest.raises(SetupError, match="cannot keep the history in"):
        open_store(str(tmp_path / name), ROWS, NOW)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/state")
    assert EstimatorSettings().database_path() == "/srv/state/tranche/history.sqlite"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert EstimatorSettings().database_path() == (
        "/home/someone/.local/state/tranche/history.sqlite"
    )
    assert EstimatorSettings(database="~/h.sqlite").database_path() == "/home/someone/h.sqlite"
    assert EstimatorSettings(database=IN_MEMORY).database_path() == IN_MEMORY
