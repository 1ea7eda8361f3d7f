"""A headless Chromium of the system, driven by Playwright, that draws WebGL 2 without a GPU."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]


def chromium_path() -> str | None:
    """Where the browser is; None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, width: int = 1000, height: int = 900) -> Iterator[Any]:
    """A report from the disk, drawn; it may ask for nothing else, and complain about nothing."""
    page = browser.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url[:200]))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("globalThis.viewer?.ready.then(() => 0)")
    yield page
    page.close()
    assert requests == [path.as_uri()], requests
    # Warnings can be those of a busy or a slow graphics driver.
    assert [text for text in complaints if not text.startswith("warning: ")] == [], complaints
