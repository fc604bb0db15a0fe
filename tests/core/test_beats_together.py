"""Beats of many workers in one message are the beats of each."""

from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.service import _came_as, _sender
from shared.messages import (
    Elected,
    WorkerBeat,
    WorkerBeats,
    WorkerInfo,
    WorkerMemory,
    decode,
    encode,
)


def beat_of(worker: str, *, leaving: bool = False) -> WorkerBeat:
    info = WorkerInfo(
        worker=worker,
        name=worker,
        engine="simulated",
        forms=("leased",),
        model="m",
        context_tokens_max=512,
        kv_block_tokens=16,
    )
    memory = WorkerMemory(kv_tokens_capacity=4096)
    return WorkerBeat(info=info, memory=memory, leaving=leaving, residents_listed=True)


def started() -> Scheduler:
    preset = preset_named("past-future")
    core = Scheduler(preset, preset.with_constants())
    core.handle(Elected(epoch=1), 0.0)
    return core


def test_a_message_of_beats_is_taken_as_each_beat_alone() -> None:
    beats = tuple(beat_of(f"host-1.{number}") for number in range(1, 4))
    together, apart = started(), started()
    told = together.handle(WorkerBeats(host="host-1", beats=beats), 0.1)
    one_by_one = [command for beat in beats for command in apart.handle(beat, 0.1)]
    assert list(together.books.workers.active) == [beat.info.worker for beat in beats]
    assert list(apart.books.workers.active) == list(together.books.workers.active)
    assert {type(command) for command in told} == {type(command) for command in one_by_one}
    leaving = beat_of("host-1.2", leaving=True)
    together.handle(WorkerBeats(host="host-1", beats=(beats[0], leaving)), 0.2)
    assert list(together.books.workers.active) == ["host-1.1", "host-1.3"]


def test_silence_of_a_process_loses_all_its_workers() -> None:
    core = started()
    beats = tuple(beat_of(f"host-1.{number}") for number in range(1, 4))
    core.handle(WorkerBeats(host="host-1", beats=beats), 0.1)
    now = 0.1
    while now < 3.0:
        now = core.deadline() or now
        core.wake(now)
    assert not core.books.workers.active
    assert core.books.workers_lost == len(beats)


def test_nobody_beats_for_anothers_workers() -> None:
    own = WorkerBeats(host="host-1", beats=(beat_of("host-1.1"),))
    foreign = WorkerBeats(host="host-1", beats=(beat_of("host-1.1"), beat_of("host-2.1")))
    assert decode(encode(own)) == own
    assert _came_as("worker.host-1", _sender(own))
    assert not _came_as("worker.host-1", _sender(foreign))
