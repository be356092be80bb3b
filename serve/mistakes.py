"""A mistake in the words of `serve run` is one line, as it is with `psyray`, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from psyray.cluster import knock
from psyray.errors import PsyrayError
from serve.stopping import drain_when_stopped

P = ParamSpec("P")
R = TypeVar("R")


class Mistake(PsyrayError, click.ClickException):
    """What is wrong, where and how to mend it; the command line of Serve prints it and ends with 1."""


def in_one_line(build: Callable[P, R]) -> Callable[P, R]:
    """An application's builder that raises its PsyrayError as a Mistake."""

    @wraps(build)
    def built(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            application = build(*args, **kwargs)
            knock()  # `serve run` goes to Ray next
            drain_when_stopped()
            return application
        except PsyrayError as error:
            raise Mistake(str(error)) from error

    return built
