"""The one exception that a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager


class PsyrayError(Exception):
    """A mistake or a limit that the user can mend; the message says what, where and how."""


@contextmanager
def from_workers() -> Iterator[None]:
    """Raise a PsyrayError of a Ray worker as it was there; Ray's version of it is a traceback around the message."""
    try:
        yield
        return
    except PsyrayError as error:
        cause = getattr(error, "cause", None)  # of Ray's; Ray Data adds a line on retries to the message
        told = PsyrayError(str(cause).partition("\nFailed to ")[0]) if isinstance(cause, PsyrayError) else error
    raise told  # out here, so that Ray's traceback keeps no actor alive
