"""docs/configuration.md, written from the settings themselves: python -m psyray.docs > docs/configuration.md"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from psyray.config import Config

HEADER = """# Configuration

Every setting with its default. A file names only what differs; `key=value` words on the command line go over it.
Written by `python -m psyray.docs`.
"""


def lines(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table line for each setting, sections flattened with dots."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from lines(field.annotation, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | {shown(field)} | {field.description or ''} |"


def shown(field: Any) -> str:
    """The default as it would stand in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        value = [entry.model_dump(exclude_defaults=True) for entry in value]
    return "none" if value is None else f"`{value}`"


def page() -> str:
    """The whole page."""
    return "\n".join([HEADER, "| setting | default | meaning |", "|---|---|---|", *lines(Config)]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
