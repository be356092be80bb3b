"""What the pages take from the library of their looks: one stylesheet, from its package and by this server."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from psyray.errors import PsyrayError
from serve import annotate, compare, pages
from serve.access import Limits
from serve.health import Health
from serve.pages import BOOTSTRAP, page_app

ROOT = Path(__file__).parents[2]


async def fine() -> None:
    pass


def client(name: str = "annotate") -> TestClient:
    return TestClient(page_app("a page", name, [], (), Limits(), Health(fine)))


@pytest.mark.parametrize("name", ["annotate", "compare"])
def test_the_stylesheet_comes_from_the_package_and_asks_nobody(name: str) -> None:
    reply = client(name).get(f"/{BOOTSTRAP}")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/css")
    assert re.search(r"Bootstrap +v5\.", reply.text)
    package = Path(str(find_spec("flask_bootstrap").origin)).parent  # type: ignore[union-attr]
    assert reply.content == (package / "static/bootstrap5/css" / BOOTSTRAP).read_bytes()
    assert "@import" not in reply.text and set(re.findall(r"url\(\"?(\w+:)", reply.text)) == {"data:"}
    assert reply.text.count("url(") == len(re.findall(r"url\(\"?data:", reply.text))
    assert re.findall(r'href="([^"]+\.css)"', client(name).get("/").text) == [
        BOOTSTRAP,
        "page.css",
    ]  # ours has the last word


def test_parts_are_kept_and_asked_about_and_all_else_is_not_kept() -> None:
    page = client()
    for part in (BOOTSTRAP, "page.css", "page.js", "annotate.js"):
        first = page.get(f"/{part}")
        assert first.headers.get_list("cache-control") == ["no-cache"], part
        again = page.get(f"/{part}", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content, again.headers["cache-control"]) == (304, b"", "no-cache")
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
        assert page.get(f"/{part}", headers={"If-None-Match": '"an-older-version"'}).status_code == 200
    for path in ("/", "/healthz", "/experts/next"):
        assert page.get(path).headers.get_list("cache-control") == ["no-store"], path


def test_parts_are_packed_for_those_who_can_read_them_so_and_answers_never() -> None:
    page = client()
    for part in ("", BOOTSTRAP, "page.css", "page.js", "annotate.js"):
        packed = page.get(f"/{part}", headers={"Accept-Encoding": "br;q=1, gzip;q=0.5"})
        assert packed.headers["content-encoding"] == "gzip", part
        for header in ("identity", "gzip;q=0", ""):
            whole = page.get(f"/{part}", headers={"Accept-Encoding": header})
            assert "content-encoding" not in whole.headers and whole.content == packed.content, (part, header)
            assert int(whole.headers["content-length"]) == len(whole.content) > int(packed.headers["content-length"])
            assert whole.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
            assert whole.headers["etag"] != packed.headers["etag"]  # else a cache could give out the wrong one
        tag = {"If-None-Match": packed.headers["etag"]}
        again = page.get(f"/{part}", headers=tag)
        assert (again.status_code, again.headers["vary"], again.headers["etag"]) == (
            304,
            "Accept-Encoding",
            *tag.values(),
        )
        assert page.get(f"/{part}", headers=tag | {"Accept-Encoding": "identity"}).status_code == 200
    assert int(page.get(f"/{BOOTSTRAP}").headers["content-length"]) < 40_000
    for path in ("/healthz", "/openapi.json"):
        assert "content-encoding" not in page.get(path).headers


def test_pictures_may_be_in_a_stylesheet_and_scripts_nowhere_but_here() -> None:
    policy = dict(rule.split(" ", 1) for rule in client().get("/").headers["content-security-policy"].split("; "))
    assert policy["img-src"] == "'self' data:"
    assert {policy[rule] for rule in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")


def test_a_missing_stylesheet_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for found, where in (
        (None, "not installed"),
        (SimpleNamespace(submodule_search_locations=[str(tmp_path)]), f"not in {tmp_path}"),
    ):
        monkeypatch.setattr(pages, "find_spec", lambda _, found=found: found)
        for start in (client, lambda: annotate.build({}), lambda: compare.build({})):
            with pytest.raises(
                PsyrayError, match=rf"bootstrap\.min\.css of the package Bootstrap-Flask, which is {where}"
            ):
                start()


def test_flask_is_not_loaded_for_it() -> None:
    code = "import sys; from serve.pages import bootstrap; bootstrap(); print('flask' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]


def test_the_locks_bring_the_package_to_where_pages_are_served() -> None:
    for lock in ("cpu", "gpu"):
        lines = (ROOT / f"requirements/{lock}.txt").read_text().splitlines()
        assert f"bootstrap-flask=={version('bootstrap-flask')}" in lines, lock
        assert f"wtforms=={version('wtforms')}" in lines, (
            lock
        )  # its own need: the locks are installed without resolving
