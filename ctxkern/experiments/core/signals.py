"""Signals that end a run at the end of a step."""

import signal
import threading


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as if unhandled."""

    def __enter__(self) -> "Signals":
        self.received: signal.Signals | None = None
        self._before = {}
        # handlers can be set in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
