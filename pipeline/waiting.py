"""How threads of torch wait for each other, in verbs whose time is that of the LPM."""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
SPINS = "GOMP_SPINCOUNT"
FEW = "1000"
"""Turns of the loop in which a thread of GNU OpenMP waits before it sleeps; by default 300,000."""


def wait_briefly() -> None:
    """Let threads of GNU OpenMP sleep after a short wait, unless the user's environment says how they wait.

    One of them that another process keeps from its core holds up the others, which occupy theirs meanwhile: with one
    of two cores occupied, an extraction takes 0.7 of the time if they sleep, and 1.02 of it on idle cores. Without any
    wait that is 1.11, and the small steps of a training take 1.8 times as long (docs/lab-notes.md); so verbs that train
    do not call this. It has no effect once torch is imported.
    """
    if "torch" not in sys.modules and os.environ.keys().isdisjoint({POLICY, SPINS}):
        os.environ[SPINS] = FEW
