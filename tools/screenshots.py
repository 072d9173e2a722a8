"""The pictures in the README: `python -m tools.screenshots RUN_DIR FEATURE` writes docs/report-*.png.

With the address of the page of `demo.py SERVE=1` in place of RUN_DIR, docs/live*.png, steered with FEATURE. Needs
chromium, its driver and selenium (requirements-dev.txt).
"""

import base64
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

DOCS = Path(__file__).parent.parent / "docs"
SCALE = 1  # pixels of a picture for one of the page
WRITTEN = "document.querySelectorAll('#texts section > .small').length === 2"


class Shot(NamedTuple):
    """A picture."""

    name: str
    address: str
    width: int
    height: int
    scheme: str
    does: str = ""  # once it is ready


def shots_of_page(address: str, feature: int) -> list[Shot]:
    """The page: a steered text in the light and in the dark, and on a phone."""
    steered = f"{address}#view=steer&f{feature}=1.4"
    write = "document.getElementById('steer-form').requestSubmit()"
    return [
        Shot(name, steered, width, 860, scheme, does=write)
        for name, width, scheme in (("live", 1280, "light"), ("live-dark", 1280, "dark"), ("live-phone", 390, "light"))
    ]


def shots_of_report(run_dir: str, feature: int) -> list[Shot]:
    """The run, a feature in the light, in the dark and on a phone, and a text if there is a page of one."""
    report, text = Path(run_dir, "report.html").resolve(), Path(run_dir, "text.html").resolve()
    opened = f"{report.as_uri()}#feature={feature}"
    shots = [
        Shot("report-run", report.as_uri(), 1280, 860, "light"),
        Shot("report-feature", opened, 1280, 860, "light"),
        Shot("report-dark", opened, 1280, 860, "dark"),
        Shot("report-phone", opened, 390, 860, "light"),
    ]
    return [*shots, Shot("report-text", text.as_uri(), 1280, 700, "light")] if text.exists() else shots


@contextmanager
def chromium() -> Iterator[WebDriver]:
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def visit(browser: WebDriver, address: str, width: int, height: int, scheme: str = "light") -> None:
    """Open a page anew on a screen of a size, and wait until it is ready."""
    screen = {"width": width, "height": height, "deviceScaleFactor": SCALE, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get(address)
    wait(browser, "performance.getEntriesByName('ready').length")


def wait(browser: WebDriver, condition: str) -> None:
    """Wait until an expression is true."""
    WebDriverWait(browser, 30, 0.05).until(lambda it: it.execute_script(f"return {condition}"))


def picture(browser: WebDriver) -> bytes:
    """What is seen, as a PNG."""
    return base64.b64decode(browser.get_screenshot_as_base64())


def main(shots: list[Shot]) -> None:
    """Take the pictures."""
    with chromium() as browser:
        for name, address, width, height, scheme, does in shots:
            visit(browser, address, width, height, scheme)
            if does:
                browser.execute_script(does)
                wait(browser, WRITTEN)
            (DOCS / f"{name}.png").write_bytes(picture(browser))
            print(DOCS / f"{name}.png")


if __name__ == "__main__":
    of = shots_of_page if sys.argv[1].startswith("http") else shots_of_report
    main(of(sys.argv[1], int(sys.argv[2])))
