"""One contender of a benchmark: a process that does one piece of work each time it is asked, and says how long it took.

Standard library only, so that it runs in anybody's environment.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Turnstile:
    """Lets a loop that belongs to somebody else through one piece of work at a time.

    A line on standard input opens it; the seconds that the work took and the units it did go to standard output.
    Whatever the libraries print goes to standard error.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self._answers, sys.stdout = sys.stdout, sys.stderr
        self._started = 0.0
        self._say(about)

    def wait(self) -> None:
        """Ends the process when nobody will ask any more."""
        if not sys.stdin.readline():
            raise SystemExit
        self._started = time.perf_counter()

    def report(self, units: int) -> None:
        seconds = time.perf_counter() - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._say({"seconds": seconds, "units": units, "peak_mib": peak})

    def _say(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._answers, flush=True)


def serve(work: Callable[[], int], about: dict[str, Any]) -> None:
    """Does `work`, which gives the units it did, each time it is asked."""
    turnstile = Turnstile(about)
    while True:
        turnstile.wait()
        turnstile.report(work())
