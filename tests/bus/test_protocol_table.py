"""docs/protocol.md names every message that travels, every queue, and the limits of the code."""

import re
from pathlib import Path
from typing import get_args

from shared.bus.api import DEAD_LETTER_QUEUE, DELIVERY_LIMIT
from shared.bus.rabbit_queues import RETURN_LIMIT
from shared.bus.topology import (
    EPOCH_QUEUE,
    ESTIMATOR_QUEUE,
    SCHEDULER_QUEUE,
    estimator_beat_queue,
    gateway_queue,
    onlooker_queue,
    worker_queue,
)
from shared.messages import ToEstimator, ToGateway, ToScheduler, ToWorker

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
PER_BOOT = tuple(
    queue("<boot>") for queue in (gateway_queue, worker_queue, estimator_beat_queue, onlooker_queue)
)


def test_every_message_has_its_row() -> None:
    unions = (ToScheduler, ToGateway, ToWorker, ToEstimator)
    messages = {message.__name__ for union in unions for message in get_args(union)}
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert sorted(rows) == sorted(messages)


def test_every_queue_has_its_row_with_its_limit() -> None:
    rows = dict(re.findall(r"^\| [\w ]+ \| `([\w.<>]+)` \| .* \| ([\d,]+)", TEXT, re.MULTILINE))
    specs = (SCHEDULER_QUEUE, ESTIMATOR_QUEUE, *PER_BOOT)
    assert set(rows) == {spec.name for spec in specs} | {EPOCH_QUEUE, DEAD_LETTER_QUEUE}
    for spec in specs:
        assert int(rows[spec.name].replace(",", "")) == spec.length_max


def test_the_limits_are_those_of_the_code() -> None:
    assert f"failed {DELIVERY_LIMIT} times" in TEXT
    assert f"given out {RETURN_LIMIT} times" in TEXT
