"""Chromium without a window, and what tests of pages do in it; they are skipped where there is none."""

import os
import shutil
import time
import warnings

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

WIDE, NARROW = 1280, 390


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not (chromium and shutil.which("chromedriver")):
        missing = "pages are not tested in a browser: apt-get install chromium chromium-driver"
        warnings.warn(f"SKIPPED: {missing}", stacklevel=1)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def quiet_console(browser):
    """Whatever a test does, nothing is written to the console."""
    resize(browser, WIDE)
    yield
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def resize(browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def assert_fits(browser, *widths):
    """Nothing is wider than the screen, at any of some widths."""
    for width in widths:
        resize(browser, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def visit(browser, address):
    browser.get("about:blank")  # or an address that differs in its fragment only would not load again
    browser.get(address)
    wait(browser, "performance.getEntriesByName('ready').length === 1")


def wait(browser, condition):
    """Poll until an expression is true."""
    deadline = time.monotonic() + 60  # on a machine that has much else to do
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


def text(browser, selector="#feature"):
    """The text inside an element, hidden parts too; spaces are what they are."""
    script = "return document.querySelector(arguments[0]).textContent.toWellFormed()"  # WebDriver takes no half pairs
    return browser.execute_script(script, selector)


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()
