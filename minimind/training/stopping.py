"""Being asked to stop: Ctrl-C, SIGTERM (a cluster, docker) and SIGHUP (a terminal that closed)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; ``signum`` is which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = int(signum)


class Stop:
    """What signals have asked for: ``signum`` is the first one's number, 0 before."""

    def __init__(self) -> None:
        self.signum = 0
        self._waits = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal inside the block: no optimizer step is cut in two."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        first, self.signum = not self.signum, self.signum or signum
        # Only a second Ctrl-C is impatient: others are sent twice, by launchers and by systems.
        if not (first and self._waits) and (first or signum == signal.SIGINT):
            raise Stopped(signum)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Make a `Stopped` of signals that would end the process; those that are ignored stay so."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers, and only it gets signals
        return
    before = {s: signal.getsignal(s) for s in SIGNALS}
    try:
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup's
                signal.signal(signum, stop._note)
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
