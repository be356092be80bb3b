"""A page's files as they go out: read and packed once, when the server starts.

Only these are packed. An answer holds what must stay secret beside what a client can choose, and the length of the
two packed together would tell how much they share (BREACH); a stream would wait in the packer for its next piece.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from hashlib import sha256
from mimetypes import guess_type
from pathlib import Path
from typing import Self

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from serve.wishes import wishes

_FILES = StaticFiles()


@dataclass(frozen=True)
class Part:
    """A file of a page; its two forms have tags of their own, by which a browser asks whether its copy still holds."""

    kind: str
    whole: bytes
    packed: bytes
    tag: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file as it is now."""
        whole = path.read_bytes()
        kind = guess_type(path)[0] or "application/octet-stream"
        return cls(kind, whole, gzip.compress(whole, mtime=0), sha256(whole).hexdigest()[:32])

    def reply(self, request: Request, cache: str) -> Response:
        """The file, packed for a client that can read it so, or 304 for one that has it; `cache` is Cache-Control."""
        packs = "gzip" in wishes(request.headers.get("Accept-Encoding", ""))
        headers = {"etag": f'"{self.tag}{"-gzip" * packs}"', "vary": "Accept-Encoding", "cache-control": cache}
        if _FILES.is_not_modified(Headers(headers), request.headers):
            return NotModifiedResponse(Headers(headers))
        if packs:
            headers["content-encoding"] = "gzip"
        return Response(self.packed if packs else self.whole, headers=headers, media_type=self.kind)
