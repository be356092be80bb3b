"""What the pages' tests share: waiting from outside, axe-core, and what every page promises to everybody."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from PIL import Image

NARROW = [(320, 568), (390, 844), (568, 320)]  # small phone, phone, small phone on its side; CSS pixels
TOUCH = 44  # CSS pixels that a finger needs


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait from here: the page's own rules forbid scripts that are made up on the way."""
    last = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < last
        time.sleep(0.02)


def faults(page: Any) -> list[str]:
    """What axe-core finds wrong with the page as it stands, in light and in dark."""
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # colours that are still changing are no fault
        page.wait_for_selector(f"html[data-bs-theme={scheme}]")
        for fault in Axe().run(page).response["violations"]:
            found += [f"{scheme}: {fault['id']} at {node['target']}: {node['html'][:120]}" for node in fault["nodes"]]
    return found


def dressed(browser: Any, url: str) -> None:
    """The library's stylesheet is the server's own and at work, in light and in dark, and nobody else is asked."""
    page = browser.new_page(color_scheme="dark")
    got: dict[str, Any] = {}
    page.on("response", lambda response: got.update({response.url: response}))
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.goto(url)
    page.wait_for_selector("#sign-in:not([hidden])")
    sheet = got[f"{url.rstrip('/')}/bootstrap.min.css"]
    assert sheet.status == 200 and sheet.headers["content-type"].startswith("text/css")
    assert sheet.headers["content-encoding"] == "gzip"
    assert {address.split("/")[2] for address in got} == {url.split("/")[2]}
    looks = "([at, what]) => getComputedStyle(document.querySelector(at))[what]"
    assert page.evaluate(looks, ["#sign-in button", "backgroundColor"]) == "rgb(13, 110, 253)"  # Bootstrap's blue
    assert page.evaluate(looks, ["body", "backgroundColor"]) == "rgb(33, 37, 41)"
    page.emulate_media(color_scheme="light")
    until(lambda: page.evaluate(looks, ["body", "backgroundColor"]) == "rgb(255, 255, 255)")
    assert troubles == []  # the page breaks none of its own rules
    page.close()


def dark_from_the_start(browser: Any, url: str) -> None:
    """Where dark is wanted no light page is seen: it is dark before its module comes, and unpainted before theme.js."""
    for late in ("page.js", "theme.js"):
        page = browser.new_page(color_scheme="dark", viewport={"width": 300, "height": 200})
        held: list[Any] = []
        page.route(f"**/{late}", partial(_hold, held))
        page.goto(url, wait_until="commit")
        page.wait_for_timeout(500)  # time enough to paint what there is
        assert held
        painted = page.evaluate("() => performance.getEntriesByType('paint').length > 0")
        assert painted == (late == "page.js")
        if painted:
            assert Image.open(BytesIO(page.screenshot())).convert("L").getpixel((150, 190)) < 60
        held[0].continue_()
        page.wait_for_selector("#sign-in:not([hidden])")
        page.close()


def _hold(held: list[Any], route: Any) -> None:
    held.append(route)


def tabbed(page: Any, count: int) -> list[str]:
    """What has the focus after each press of Tab: its id, its choice, or its words."""
    names = []
    for _ in range(count):
        page.keyboard.press("Tab")
        names.append(page.evaluate(
            "() => { const e = document.activeElement;"
            " return e.id || e.dataset.choice || (e.dataset.key && `${e.dataset.key} ${e.dataset.side}`)"
            " || e.textContent.trim(); }"
        ))  # fmt: skip
    return names


def fits_on_phones(page: Any) -> None:
    """No sideways scrolling, nothing for a finger too small, and the last words not behind the bar of choices."""
    for width, height in NARROW:
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"), width
        for button in page.get_by_role("button").all():
            assert button.bounding_box()["height"] >= TOUCH, button.inner_text()
        page.evaluate("() => scrollTo({ top: document.documentElement.scrollHeight, behavior: 'instant' })")
        covered = page.evaluate(
            "() => { const bar = document.getElementById('choices').getBoundingClientRect();"
            " const last = document.querySelector('main').getBoundingClientRect();"
            " return getComputedStyle(document.getElementById('choices')).position === 'fixed'"
            " && last.bottom > bar.top; }"
        )
        assert not covered, (width, height)


def refused_by_its_own_rules(page: Any) -> None:
    """Requests and pictures of other hosts, and markup that is made of text, are stopped in the browser."""
    for rule, attempt in {
        "connect-src": "fetch('http://elsewhere.invalid/?words=secret').catch(() => {})",
        "img-src": "new Image().src = 'http://elsewhere.invalid/pixel.png'",
        "require-trusted-types-for": "try { document.body.innerHTML = '<script>1</script>' } catch {}",
    }.items():
        broken = page.evaluate(
            "() => new Promise((found) => { document.addEventListener('securitypolicyviolation',"
            f" (event) => found(event.effectiveDirective), {{once: true}}); {attempt}; }})"
        )
        assert broken == rule
