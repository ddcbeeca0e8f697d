"""Take the pictures of docs/pictures.md: `python docs/screenshots.py` writes docs/images/report.

Each report of a study's table is taken as a reader first sees it, in light, dark and on a phone, and its first page as
printed. It needs chromium, chromedriver, selenium and Pillow.
"""

import base64
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from lnjac.reporting.report import report

HERE = Path(__file__).parent
TABLES = HERE.parent / "studies" / "cost"
NAMES = ("cost250", "cost1000", "methods250", "width", "step", "inside")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
LOOKS = {
    "light": (1280, 800, "", "light"),
    "dark": (1280, 800, "", "dark"),
    "phone": (390, 844, "", "light"),
    "print": (794, 1123, "print", "light"),
}
"""Width and height in pixels, the medium and the colours that are preferred; paper is A4."""
COLOURS = 256
"""Colours of a picture, so that it stays small."""


@contextmanager
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or ""))
    try:
        yield driver
    finally:
        driver.quit()


def taken(driver: Any, page: Path, width: int, height: int, medium: str, scheme: str) -> Image.Image:
    """Return the first screen of a page, or its first sheet."""
    media = {"media": medium, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get("about:blank")
    driver.get(page.as_uri())
    end = time.monotonic() + 60
    while driver.execute_script("return document.documentElement.dataset.ready") != "yes":
        if time.monotonic() > end:
            raise TimeoutError(f"{page} was not drawn within a minute")
        time.sleep(0.1)
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


def main(folder: Path) -> None:
    """Write a picture of each table in each look."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, browser() as driver:
        for name in NAMES:
            page = Path(temporary) / f"{name}.html"
            report(TABLES / f"{name}.parquet", output=page)
            for look, how in LOOKS.items():
                picture = taken(driver, page, *how).quantize(COLOURS, dither=Image.Dither.NONE)
                picture.save(folder / f"{name}-{look}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "images" / "report")
