"""The speed part: quick runs make a section, and a slow run is called slow."""

import msgspec

from sim.reproduction import speed


def test_quick_runs_make_a_section_whose_journal_replays() -> None:
    tasks = [task for task in speed.tasks(quick=True) if task.policy == "past-future"]
    results = [speed.run(task, lambda done, total: None) for task in tasks]
    section = speed.section(results)
    assert [result.completed for result in results] == [speed.QUICK_REQUESTS] * 3
    assert [check.holds for check in section.checks] == [True, True, True]
    assert results[-1].steps > speed.QUICK_REQUESTS


def test_slow_and_unfaithful_runs_are_told() -> None:
    quick = speed.Result("vllm", 1.0, 10, 10, 1.0, 0.5, 100, 60.0)
    slow = msgspec.structs.replace(quick, cpu_s=20.1)
    cut = msgspec.structs.replace(quick, completed=9)
    other = msgspec.structs.replace(quick, scale=3.2)
    unfaithful = msgspec.structs.replace(quick, steps=5, same=False)
    for bad in (slow, cut):
        section = speed.section([quick, bad, other, unfaithful])
        assert [check.holds for check in section.checks] == [False, True, False]
