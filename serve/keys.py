"""Who may ask: names and their bearer tokens, from the environment or a file, of which only digests are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from psyray.errors import PsyrayError

MIN_TOKEN = 16  # characters
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Keys:
    """The digests of tokens, by name."""

    digests: Mapping[str, bytes]

    @classmethod
    def read(cls, variable: str, file: Path | None = None) -> Keys:
        """The keys in a file, one `name=token` a line, else in an environment variable, divided by commas.

        PsyrayError where there are none, or one of them cannot be used; it shows no token.
        """
        if file is None:
            where, text = variable, os.environ.get(variable, "").replace(",", "\n")
        elif file.is_file():
            where, text = str(file), file.read_text()
        else:
            raise PsyrayError(f"no file of keys at {file}; it has a line name=token for each expert")
        lines = [line.strip() for line in text.splitlines()]
        return cls(_digests([line for line in lines if line and not line.startswith("#")], where))

    def name(self, header: str | None) -> str | None:
        """Whose token an Authorization header holds; takes as long for a wrong one as for a right one."""
        scheme, _, token = (header or "").partition(" ")
        given, found = _digest(token.strip()), None
        for name, digest in self.digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _digests(lines: Iterable[str], where: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        name, _, token = (part.strip() for part in line.partition("="))
        if not _NAME.fullmatch(name):
            raise PsyrayError(f"{where}, key {number}: a key is name=token; a name has letters, digits and . _ - only")
        if len(token) < MIN_TOKEN:
            raise PsyrayError(f"{where}: the token of {name} has fewer than {MIN_TOKEN} characters; make one with "
                              "`python -c 'import secrets; print(secrets.token_urlsafe())'`")  # fmt: skip
        if name in found or _digest(token) in found.values():
            raise PsyrayError(f"{where}: {name} or their token stands there twice; each expert has one of their own")
        found[name] = _digest(token)
    if not found:
        raise PsyrayError(f"no expert has a key: set {where} to name=token,name=token, or give keys=FILE")
    return found
