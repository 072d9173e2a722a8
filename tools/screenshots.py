"""The pictures of the report in the README: `python -m tools.screenshots RUN_DIR FEATURE` writes docs/report-*.png.

Needs chromium, its driver and selenium (requirements-dev.txt).
"""

import base64
import os
import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

DOCS = Path(__file__).parent.parent / "docs"
SCALE = 1  # pixels of a picture for one of the page


def main(run_dir: Path, feature: int) -> None:
    """The run, a feature in the light, in the dark and on a phone, and a text if there is a page of one."""
    report, text = run_dir.resolve() / "report.html", run_dir.resolve() / "text.html"
    opened = f"{report.as_uri()}#feature={feature}"
    shots = [
        ("report-run", report.as_uri(), 1280, 860, "light"),
        ("report-feature", opened, 1280, 860, "light"),
        ("report-dark", opened, 1280, 860, "dark"),
        ("report-phone", opened, 390, 860, "light"),
    ]
    if text.exists():
        shots.append(("report-text", text.as_uri(), 1280, 700, "light"))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for name, address, width, height, scheme in shots:
            screen = {"width": width, "height": height, "deviceScaleFactor": SCALE, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            browser.get("about:blank")
            browser.get(address)
            WebDriverWait(browser, 10).until(
                lambda it: it.execute_script("return performance.getEntriesByName('ready').length")
            )
            (DOCS / f"{name}.png").write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))
            print(DOCS / f"{name}.png")
    finally:
        browser.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
