"""The report in a browser: it opens from a file without network and without a word of complaint, and it can be used."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from support.studies import write_study

from lnjac.comparing.tables import open_tables
from lnjac.reporting import report

pytest.importorskip("altair", reason="the extra [report] is not installed")
pytest.importorskip("vl_convert", reason="the extra [report] is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
]
FLAGS += ["--disable-background-networking", "--disable-sync", "--proxy-server=127.0.0.1:9"]  # nobody listens there
EVIL = "</script><script>window.hacked = 1</script>"

MAPS = "[data-linked]:has([data-rows])"
"""The part of the page that holds maps and the curves they choose."""

FACTORS = {
    "attn_mode": [" sig  moid\n", f'softmax\u2028{EVIL} \\u \\"'],
    "ln_backward": ["exact", "center_scale"],
    "model.n_embd": [32, 64],
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_script_timeout(300)  # axe takes half a minute on a slow machine
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = report.make(open_tables(write_study(folder, FACTORS, blocks=1)), title=f"sweep {EVIL}")
    made.write(folder / "report.html")
    return folder / "report.html"


def opened(browser: Any, file: Path, *, scheme: str = "light", width: int = 1100) -> None:
    """Open the page as a reader with these preferences would, and wait until its charts are drawn."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(file.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")


def until(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the page never got there"
        time.sleep(0.1)


def curve(browser: Any) -> str:
    """The path of the first line of the curves that a map's cells choose."""
    found: str = browser.execute_script(
        "return document.querySelector('[data-rows] .mark-line path').getAttribute('d')"
    )
    return found


def table(browser: Any) -> str:
    found: str = browser.execute_script("return document.querySelector('[data-rows] tbody').textContent")
    return found


def test_it_opens_offline_and_without_complaint(browser: Any, file: Path):
    opened(browser, file)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert requests == {file.as_uri()}
    assert browser.execute_script("return window.hacked") is None
    assert browser.title == f"sweep {EVIL}"
    charts = browser.execute_script("return document.querySelectorAll('.chart').length")
    drawn = browser.execute_script("return document.querySelectorAll('.chart > svg').length")
    assert charts == drawn > 10


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Any, file: Path, tmp_path: Path):
    forged = tmp_path / "forged.html"
    forged.write_text(file.read_text().replace("</main>", "<script>window.hacked = 1</script></main>"))
    opened(browser, forged)
    assert browser.execute_script("return window.hacked") is None
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_a_click_on_a_maps_cell_updates_the_curves(browser: Any, file: Path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    opened(browser, file)
    path, rows = curve(browser), table(browser)
    cell = browser.find_elements(By.CSS_SELECTOR, f"{MAPS} .mark-rect path")[10]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).click().perform()
    until(lambda: curve(browser) != path)
    assert table(browser) != rows
    said = browser.find_element(By.CSS_SELECTOR, "[data-said]").text
    lists = browser.find_elements(By.CSS_SELECTOR, f"{MAPS} select")
    values = [one.get_property("value") for one in lists]
    assert said == ", ".join(values)
    assert values[1:] != ["ln_f", "radial_share"]


def test_the_lists_do_the_same_for_a_keyboard(browser: Any, file: Path):
    from selenium.webdriver.common.by import By

    opened(browser, file)
    for name in ("cell", "site", "metric"):
        path = curve(browser)
        browser.find_element(By.CSS_SELECTOR, f"{MAPS} select[name={name}]").send_keys("\ue015")
        until(lambda path=path: curve(browser) != path)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_readers_preference_and_paper_is_light(browser: Any, file: Path, scheme: str):
    opened(browser, file, scheme=scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    paper, label = {"light": ("255, 255, 255", "90, 95, 106"), "dark": ("21, 23, 27", "166, 171, 182")}[scheme]
    shown = [browser.execute_script(style, *of) for of in ((":root", "background-color"), (".mark-text text", "fill"))]
    assert shown == [f"rgb({paper})", f"rgb({label})"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert browser.execute_script(style, ":root", "background-color") == "rgb(255, 255, 255)"


def test_paper_shows_what_is_folded(browser: Any, file: Path):
    opened(browser, file)
    shown = "return [...document.querySelectorAll('details table')].map((one) => one.checkVisibility())"
    assert not any(browser.execute_script(shown))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert all(browser.execute_script(shown))


def test_older_browsers_unfold_for_paper_and_fold_again(browser: Any, file: Path):
    opened(browser, file)
    n_open = "return document.querySelectorAll('details[open]').length"
    browser.execute_script("document.querySelector('details').open = true; dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(n_open) == file.read_text().count("<details>")
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(n_open) == 1


def test_a_narrow_page_scrolls_only_downwards(browser: Any, file: Path):
    opened(browser, file, width=420)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420


def test_axe_finds_nothing_serious(browser: Any, file: Path):
    axe = Path(os.environ.get("AXE_CORE") or str(files("axe_core_python") / "axe.min.js"))
    for scheme in ("light", "dark"):
        opened(browser, file, scheme=scheme)
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.execute_script(axe.read_text())
        found = browser.execute_async_script("axe.run().then((found) => arguments[0](found.violations))")
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
