"""A headless Chromium for tests of pages; they skip where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# WebGL 2 without a GPU.
ARGUMENTS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A running browser, of the system, not one that Playwright would download."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, width: int = 1000, height: int = 900) -> Iterator[Any]:
    """A page from the disk, ready; it must ask for nothing else, and complain about nothing."""
    page = browser.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url[:200]))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("globalThis.viewer?.ready.then(() => 0)")
    yield page
    assert requests == [path.as_uri()]
    assert complaints == []
    page.close()
