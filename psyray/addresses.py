"""Addresses in the settings hold no secret: a run folder, its mirror and MLflow keep the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel

from psyray.errors import PsyrayError
from psyray.sections.data import EndpointSection
from psyray.sections.place import TrackSection

_USER_INFO = re.compile(r"://[^/\s]*@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|passw|secret|sig)[^=&\s]*=)[^&\s]+", re.I)
# What stands before the host, with or without a scheme; a password may hold an @ and, by mistake, a slash.
_BEFORE_HOST = re.compile(r"(?:[\w+.-]+://|(?![\w+.-]+://))[^/?#:@]*(?P<password>:[^?]*)?@")
# `sslkey` of a database is the name of a file.
_SECRET_NAME = re.compile(
    r"[?&;#](?:[^=&;]*(?:api-?key|token|secret|passwo?r?d|signature|credential)|(?:[^=&;]*[-_.])?(?:key|sig|pwd))=",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without the user names, passwords and keys of any URL in it."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("://***@", text))


def refuse_secrets(settings: BaseModel, at: str = "") -> None:
    """PsyrayError where the address of an endpoint or of MLflow holds a secret; it names the setting and the mend."""
    for name, section in _sections(settings, at):
        if isinstance(section, EndpointSection) and section.url:
            refuse_secret(f"{name}.url", section.url, f"{name}.api_key_env", section.api_key_env)
        if isinstance(section, TrackSection) and section.uri:
            refuse_registry_secret(f"{name}.uri", section.uri)


def refuse_registry_secret(setting: str, uri: str) -> None:
    """PsyrayError where the URI of an MLflow holds a secret."""
    if holds_secret(uri):
        raise PsyrayError(
            f"{setting} holds a user name, a password or a key, which would be kept with the settings: leave it out of "
            "the URI and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for a "
            f"server, PGPASSWORD for PostgreSQL; or leave {setting} out and set MLFLOW_TRACKING_URI"
        )


def refuse_secret(setting: str, url: str, names_variable: str, variable: str) -> None:
    """PsyrayError where an endpoint's URL holds a secret; `variable` is what the setting `names_variable` says."""
    if holds_secret(url):
        raise PsyrayError(
            f"{setting} holds a user name, a password or a key, which would be kept with the settings: leave it out of "
            f"the URL and set {f'${variable}' if variable else 'an environment variable'}, which is sent as a bearer "
            f"token ({names_variable} names the variable)"
        )


def holds_secret(url: str) -> bool:
    """Whether a URL holds a password, a query key that looks like a secret, or a user name where that may be one.

    A database's user name is none (its password comes from the environment); an HTTP server's may be a token.
    """
    found, scheme = _BEFORE_HOST.match(url), url.partition("://")[0].lower()
    return bool(_SECRET_NAME.search(url) or (found and (found["password"] or scheme in ("http", "https"))))


def _sections(model: BaseModel, at: str) -> Iterator[tuple[str, BaseModel]]:
    """Every section in the tree with its dotted name."""
    for key in type(model).model_fields:
        value, name = getattr(model, key), f"{at}.{key}" if at else key
        for place, one in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(one, BaseModel):
                here = name if place is None else f"{name}.{place}"
                yield here, one
                yield from _sections(one, here)
