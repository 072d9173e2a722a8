"""Twenty seconds of the live page: `python -m tools.film http://127.0.0.1:8000/ FEATURE` writes docs/live.gif.

A text is looked into, FEATURE opened and steered with, weakly, well and too strongly, and its strength swept.
"""

import io
import sys
from collections.abc import Iterator

from PIL import Image
from selenium.webdriver.remote.webdriver import WebDriver

from tools.screenshots import DOCS, WRITTEN, chromium, picture, visit, wait

SIZE, WIDTH, COLOURS = (1280, 860), 900, 64  # of the page, of the film, and in it
TEXT = 'def load(path):\n    """Read the lines of a file."""\n    with open(path) as f:\n        return f.readlines()'
STRENGTHS = (0.7, 1.4, 2.7)

Frame = tuple[bytes, int]  # and milliseconds


def frames(browser: WebDriver, address: str, feature: int) -> Iterator[Frame]:
    """The scenes one after the other; while a text or a sweep grows, what is seen of it."""
    visit(browser, f"{address}#view=look", *SIZE)
    browser.execute_script("document.getElementById('look-text').value = arguments[0]", TEXT)
    yield picture(browser), 1200
    browser.execute_script("document.getElementById('look-form').requestSubmit()")
    wait(browser, "!document.getElementById('found').hidden")
    yield picture(browser), 1800
    browser.execute_script("document.querySelectorAll('#text .t')[6].click()")
    wait(browser, "document.querySelector('#effect h3') !== null")
    yield picture(browser), 2400
    browser.execute_script("location.hash = 'feature=' + arguments[0]", feature)
    wait(browser, "!document.getElementById('feature').hidden")
    yield picture(browser), 400
    browser.execute_script("document.querySelector('#feature .steer button.main').click()")
    wait(browser, "!document.getElementById('steer').hidden")
    for strength in STRENGTHS:
        browser.execute_script(
            "const number = document.querySelector('#edits input[type=number]'); number.value = arguments[0];"
            "number.dispatchEvent(new Event('input', { bubbles: true }));"
            "document.getElementById('steer-form').requestSubmit()",
            strength,
        )
        yield from growing(browser, WRITTEN)
        yield picture(browser), 2200
    browser.execute_script("document.getElementById('sweep').click()")
    yield from growing(browser, "document.querySelector('#steer-status').textContent.length > 40")
    yield picture(browser), 2600


def growing(browser: WebDriver, condition: str) -> Iterator[Frame]:
    """What is seen until a condition holds."""
    while not browser.execute_script(f"return {condition}"):
        yield picture(browser), 40


def main(address: str, feature: int) -> None:
    """Write the film, with one palette so that it does not flicker."""
    with chromium() as browser:
        pngs, times = zip(*frames(browser, address, feature), strict=True)
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    images = [image.resize((WIDTH, WIDTH * image.height // image.width), Image.Resampling.LANCZOS) for image in images]
    palette = images[1].quantize(COLOURS)  # in which tokens are shaded
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    path = DOCS / "live.gif"
    first.save(path, save_all=True, append_images=rest, duration=list(times), loop=0, optimize=True)
    print(f"{path}: {len(images)} pictures, {sum(times) / 1000:.0f} seconds, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
