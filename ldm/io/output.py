"""What is printed when nobody reads it any more: `| head` has ended, the terminal is gone, a log's disk is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Lasting:
    """A text stream that swallows what cannot be written, instead of ending the work that was to print it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BlockingIOError:  # a terminal that somebody made not to wait: this text is lost, later ones may not be
            return len(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Let all that follows go nowhere, also what waits in the buffer and what libraries write by number."""
        with suppress(OSError):
            _send_nowhere(self.stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Whatever becomes of who reads stdout and stderr, inside this the program goes on."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lasting(stream or _closed(number)) for number, stream in enumerate(before, 1))
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()  # or the interpreter would fail to, at its end
        sys.stdout, sys.stderr = before


def _closed(number: int) -> TextIO:
    """A stream for a program that was started without one (`2>&-`), before a file of ours gets its number."""
    try:
        os.fstat(number)
    except OSError:
        _send_nowhere(number)
    return open(os.devnull, "w")


def _send_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
