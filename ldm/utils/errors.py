"""Errors that end as one line on the terminal: what is wrong, the value, what was expected, what to do."""

import contextlib
from collections.abc import Iterator


class LdmError(Exception):
    """Base of every error a user can cause; entry points print its message as one line and exit with `exit_code`."""

    exit_code = 1


class ConfigError(LdmError):
    """A setting that cannot be: an unknown key, an impossible size, zero steps."""

    exit_code = 2


class DataError(LdmError):
    """A dataset, image, caption or prompt that cannot be used."""

    exit_code = 3


class WeightsError(LdmError):
    """A weights file that is malformed, incomplete, or made for another network."""

    exit_code = 4


class CheckpointError(WeightsError):
    """A checkpoint of ours that is incomplete, damaged, or belongs to another run."""


class NonFiniteError(LdmError):
    """The loss or the gradients stopped being numbers."""

    exit_code = 5


class RankError(LdmError):
    """Another process of a distributed run is gone, or does not answer."""

    exit_code = 6


@contextlib.contextmanager
def reading(what: object, problem: str, kind: type[LdmError]) -> Iterator[None]:
    """Whatever a damaged or hostile file makes the code inside raise, as one line: "WHAT: PROBLEM (KeyError: 'x')"."""
    try:
        yield
    except kind:
        raise
    except LdmError as error:
        raise kind(f"{what}: {error}") from error
    except Exception as error:
        raise kind(f"{what}: {problem} ({in_a_line(error)})") from error


def in_a_line(error: Exception) -> str:
    """Type and text of an error, on one line and not long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
