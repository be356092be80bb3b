"""The one exception that a user is meant to read."""

import difflib
import gc
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PsyrayError(Exception):
    """A mistake or a limit that the user can mend; the message says what, where and how."""


def hint(word: str, known: Iterable[str]) -> str:
    """For a message about a word that is not known: the one that was meant, or else all there are."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def from_workers(work: Callable[P, R]) -> Callable[P, R]:
    """Raise a PsyrayError of a Ray worker as it was there; Ray's version of it is a traceback around the message.

    Ray's exception is let go before: it and Ray Data's frames hold each other, and with them a stage's actors, which
    would keep their CPUs and GPUs until Python collects.
    """

    @wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except PsyrayError as error:
            cause = getattr(error, "cause", None)  # of Ray's; Ray Data adds a line on retries to the message
            if not isinstance(cause, PsyrayError):
                raise
            told = PsyrayError(str(cause).partition("\nFailed to ")[0])
        gc.collect()
        raise told

    return done
