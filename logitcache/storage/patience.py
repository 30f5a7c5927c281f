"""Repeats requests that may succeed later."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 180.0  # seconds without progress for which a request is repeated
FIRST_PATIENCE = 20.0  # as long as nothing ever answered: the endpoint may be misspelt
_PAUSES = 0.1, 15.0  # seconds between two attempts, doubled each time

T = TypeVar("T")


class Passing(Exception):
    """A fault that may pass. Its text says it in one line."""


def persist(attempt: Callable[[], T], patience: Callable[[], float], progress: Callable[[], int] = lambda: 0) -> T:
    """What ``attempt`` returns; while it raises Passing, it is called again.

    Args:
        patience: seconds, asked before each pause; they are counted from the last time that ``progress`` changed.
    Raises: the last Passing, when there is no patience left.
    """
    began, done, pause = time.monotonic(), progress(), _PAUSES[0]
    while True:
        try:
            return attempt()
        except Passing:
            if progress() != done:
                began, done, pause = time.monotonic(), progress(), _PAUSES[0]
            if time.monotonic() - began + pause > patience():
                raise
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _PAUSES[1])
