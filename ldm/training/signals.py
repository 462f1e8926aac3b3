"""Ctrl-C, SIGTERM, a closed terminal's SIGHUP and the schedulers' SIGUSR1 and SIGUSR2: finish the step, save, leave."""

import os
import signal
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """Training stopped by a signal, after a checkpoint: exit code 128 + its number."""


class Signals:
    """Remembers the first signal, so that the step can end and be saved; the second one acts at once.

    A signal that is ignored from the start stays so: SIGHUP under nohup, Ctrl-C of what a script put in the background.
    """

    def __init__(self):
        self.number = 0
        self.process = os.getpid()
        self.cutting = False  # a hook is running: nothing is lost by stopping in the middle of it

    def __enter__(self) -> "Signals":
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        try:
            self.previous = {number: signal.signal(number, self._handle) for number in heard}
        except ValueError:  # not the main thread, a notebook's for instance
            self.previous = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def call(self, hook: Callable, *arguments: Any) -> Any:
        """hook(*arguments), cut short by a signal; not called at all once one has come."""
        try:
            self.cutting = True
            result = None if self.number else hook(*arguments)
            self.cutting = False
            return result
        except Interrupted:
            return None
        finally:
            self.cutting = False

    def leave(self, number: int) -> None:
        """End as the signal asked: by whoever handled it before us, such as a scheduler's requeue, else by exiting.

        Stay where there was none, number 0.
        """
        if not number:
            return
        previous = self.previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, None)
        raise Interrupted(128 + number)

    def _handle(self, number: int, _frame: Any) -> None:
        if os.getpid() != self.process:  # a forked data worker: its trainer tells it when to go
            return
        if self.number and number == signal.SIGHUP:  # the shell and the terminal each send one; so do logouts
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.process, number)
        self.number = number
        if self.cutting:
            raise Interrupted(128 + number)
