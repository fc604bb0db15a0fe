"""What if: what would have become of one request in a run, had it been sent otherwise.

A copy of the whole process (fork) goes that other way until the request has its first token, and
tells; the run itself knows nothing of it. A run of its own from the start would not do: a second
change, or the first, makes another world of all that comes after it.
"""

import os
import struct
from collections.abc import Callable, Container

from sim.clients import Call
from sim.items import Item
from sim.mesh import SimMesh

LOOKED_AFTER_S = 0.25
"""Of virtual time, until a copy looks again whether it may stop."""
TOLD = struct.Struct("d")


def first_tokens(
    mesh: SimMesh, numbers: Container[int], otherwise: Callable[[Item], Item], patience_s: float
) -> dict[int, float]:
    """Run this mesh, which has not begun, to its end. Of the sendings with these numbers: seconds
    to the first token, had each alone been sent as `otherwise` says; infinite if there was none in
    so long."""
    found: dict[int, float] = {}
    clients, submit = mesh.clients, mesh.clients.submit
    copied: list[tuple[Call, int]] = []
    """In a copy: the call that it is about, and where it tells."""

    def submit_both(call: Call) -> None:
        if not copied and call.number in numbers:
            reading, writing = os.pipe()
            if (copy := os.fork()) == 0:
                call.item = otherwise(call.item)
                copied.append((call, writing))
            else:
                os.close(writing)
                found[call.number] = _told(reading, copy)
        submit(call)

    clients.submit = submit_both
    mesh.start()
    try:
        while not clients.done:
            mesh.world.run(mesh.world.now + LOOKED_AFTER_S)
            for call, writing in copied:
                if _over(call, mesh.world.now - patience_s):
                    os.write(writing, TOLD.pack(_waited_s(call, patience_s)))
                    os._exit(0)
    finally:
        if copied:
            os._exit(1)
    return found


def _over(call: Call, since: float) -> bool:
    return call.first_at is not None or call.outcome is not None or call.sent_at < since


def _waited_s(call: Call, patience_s: float) -> float:
    waited_s = float("inf") if call.first_at is None else call.first_at - call.sent_at
    return waited_s if waited_s <= patience_s else float("inf")


def _told(reading: int, copy: int) -> float:
    """What the copy says, when it has ended."""
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(copy, 0)
    assert status == 0, "a copy of the world has failed"
    (seconds,) = TOLD.unpack(said)
    return float(seconds)
