"""What a client would rather have, of its headers Accept-Language and Accept-Encoding."""

from __future__ import annotations

import re

_WEIGHT = re.compile(r"[0-9](\.[0-9]{1,9})?")


def wishes(header: str) -> list[str]:
    """The names in the header (RFC 9110, 12.4.2), lower case, the most wanted first; without those of weight 0."""
    weighed = []
    for place, part in enumerate(header.lower().split(",")):
        name, _, weight = part.strip().partition(";")
        value = weight.strip().removeprefix("q=")
        wanted = float(value) if _WEIGHT.fullmatch(value) else 1.0
        if name.strip() and wanted > 0:
            weighed.append((-wanted, place, name.strip()))
    return [name for _, _, name in sorted(weighed)]
