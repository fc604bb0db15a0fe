"""Process trees of the comparison: pinned, frozen whole, thawed, ended to the last child."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bench.peers.processes import ServerFailed, Tree, read_counters

PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
while True:
    pass
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(max(os.sched_getaffinity(0)), tmp_path / "logs")
    tree.spawn("busy", [sys.executable, "-c", PARENT])
    wait_for(lambda: len(tree.processes()) == 2)
    yield tree
    tree.stop()


def test_a_tree_stays_on_its_core_and_stands_still_when_frozen(tree: Tree) -> None:
    assert tree.off_core() == []
    tree.freeze()
    wait_for(lambda: {p.status() for p in tree.processes()} == {psutil.STATUS_STOPPED})
    frozen = tree.cpu_s()
    assert read_counters(tree).tree_s == frozen
    tree.thaw()
    wait_for(lambda: tree.cpu_s() > frozen)
    assert tree.rss_mb() > 1


def test_stop_ends_a_frozen_tree_to_the_last_child(tree: Tree) -> None:
    everybody = tree.processes()
    tree.freeze()
    tree.stop()
    assert not any(process.is_running() for process in everybody)
    assert tree.processes() == []


def test_a_process_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    tree = Tree(max(os.sched_getaffinity(0)), tmp_path)
    tree.spawn("short", [sys.executable, "-c", "raise SystemExit(3)"])
    tree.roots["short"].wait(20)
    with pytest.raises(ServerFailed, match=r"short ended; see .*short\.log"):
        tree.check()
