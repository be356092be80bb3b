"""The one exception that a user is meant to read."""


class PsyrayError(Exception):
    """A mistake or a limit that the user can mend; the message says what, where and how."""
