"""The watchdog ends what stands still, and leaves alone what has said that it takes long."""

from __future__ import annotations

import pytest
from ranks import Server

from dino_xcit.errors import LOST

STAND_STILL = """
import time
from dino_xcit.runtime.watchdog import Watchdog
with Watchdog(1.0) as watchdog:
    watchdog.now("opening the data", 0, patient={patient})
    time.sleep(4)
    watchdog.now("building the networks", 0)
print("went on")
"""


@pytest.mark.parametrize("patient", [False, True])
def test_opening_a_million_images_is_no_standing_still(server: Server, patient: bool) -> None:
    done = server.python("-c", STAND_STILL.format(patient=patient))
    if patient:
        assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (LOST, "")
        assert "opening the data" in done.stderr
