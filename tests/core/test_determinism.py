"""Equal histories give equal commands, whatever the interpreter's hash seed."""

import os
import subprocess
import sys

import pytest

from tests.core.test_world import make_world, submit_some
from tests.core.world import STORM

PROGRAM = "from tests.core.test_determinism import digest; print(digest())"


def digest() -> str:
    """A fingerprint of all commands of a stormy history."""
    import hashlib

    from shared.messages import encode

    world = make_world("scls", 5)
    world.add_gateway()
    world.net.faults = STORM
    submit_some(world, 15)
    next(iter(world.workers.values())).die()
    world.kill_scheduler(0.5)
    world.run_until_done(200)
    whole = hashlib.sha256(b"".join(encode(command) for command in world.transcript))
    return whole.hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_hash_seed_changes_nothing(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == digest()
