"""The report in a browser: it opens from a file without network and without a word of complaint, and it can be used."""

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.paths import STUDY
from support.studies import write_study

from lnjac.reporting.frames import worded
from lnjac.reporting.report import report

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
    report(write_study(folder, FACTORS, blocks=1), output=folder / "report.html", title=f"sweep {EVIL}")
    return folder / "report.html"


def opened(browser: Any, file: Path, *, scheme: str = "light", width: int = 1100, height: int = 900) -> None:
    """Open the page as a reader with these preferences would, and wait until its charts are drawn."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get("about:blank")  # the same address would not be loaded again
    browser.get(file.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")


def until(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the page never got there"
        time.sleep(0.1)


def curve(browser: Any, figure: str = ".curves") -> str:
    """The path of the first line of a chart."""
    found: str = browser.execute_script(f"return document.querySelector('{figure} .mark-line path').getAttribute('d')")
    return found


def table(browser: Any, figure: str = ".curves") -> str:
    found: str = browser.execute_script(f"return document.querySelector('{figure} tbody').textContent")
    return found


def chosen(browser: Any) -> dict[str, str]:
    """What the lists show."""
    found: dict[str, str] = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('select')].map(({ name, value }) => [name, value]))"
    )
    return found


def click_on_the_map(browser: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    cell = browser.find_elements(By.CSS_SELECTOR, ".heatmap .mark-rect path")[10]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).click().perform()


def test_it_opens_offline_and_without_complaint(browser: Any, file: Path):
    opened(browser, file)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert requests - {"about:blank"} == {file.as_uri()}
    assert browser.execute_script("return window.hacked") is None
    assert browser.title == f"sweep {EVIL}"
    charts = browser.execute_script("return document.querySelectorAll('.chart').length")
    drawn = browser.execute_script("return document.querySelectorAll('.chart > svg').length")
    assert charts == drawn > 8


TWO = {"attn_mode": ["sigmoid", "softmax"]}
BACKWARDS = ["exact", "center_scale", "center", "projected", "ste", "scale", "radial"]
STUDIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one run": ({}, {"seeds": 1}),
    "one seed a level": (TWO, {"seeds": 1}),
    "two levels": (TWO, {}),
    "seven backwards": (TWO | {"ln_backward": BACKWARDS}, {}),
    "widths": (TWO | {"model.n_embd": [32, 64, 128]}, {}),
    "steps": ({"steps": [100, 250, 1000]}, {}),
    "100 levels": ({"optimizer.lr": [i / 1000 for i in range(1, 101)]}, {"blocks": 0}),
    "100 cells": (TWO | {"optimizer.lr": [i / 1000 for i in range(1, 101)]}, {"blocks": 0, "steps": (0, 100)}),
    "all diverged": (TWO, {"diverged": tuple(range(6))}),
}


def recorded(folder: Path) -> list[Path]:
    """Runs of somebody's own model, by lnjac.record."""
    torch = pytest.importorskip("torch")
    import lnjac

    for seed, width in product((1, 2, 3), (8, 16)):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 1))
        probe = lnjac.probe(model)
        with lnjac.record(str(folder / f"{width}-{seed}"), config={"width": width}, seed=seed) as run:
            for step in (1, 2, 3):
                with probe.watch(step) as seen:
                    seen.tokens(16)
                    loss = model(torch.randn(16, 4)).square().mean()
                    loss.backward()
                run.layers(probe.rows(step), step)
                run.scalars(step, train_loss=loss.item())
    return [folder]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind of study."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, (factors, more) in STUDIES.items():
        (folder / name).mkdir()
        found[name] = folder / f"{name}.html"
        report(write_study(folder / name, factors, **more), output=found[name])
    found |= {name: folder / f"{name}.html" for name in ("recorded", "diagnostics")}
    report(recorded(folder / "recorded"), output=found["recorded"])
    report(STUDY / "inside.parquet", output=found["diagnostics"])  # of every kind
    return found


@pytest.mark.rare
@pytest.mark.parametrize("name", [*STUDIES, "recorded", "diagnostics"])
def test_the_first_screen_has_the_answer(browser: Any, pages: dict[str, Path], name: str):
    """The sentence, and at least half of one chart; no warning, and no sideways scrolling."""
    for width, height in ((1280, 800), (390, 844)):
        opened(browser, pages[name], width=width, height=height)
        assert browser.get_log("browser") == []
        place = "const at = document.querySelector(arguments[0]).getBoundingClientRect(); return [at.top, at.bottom]"
        top, bottom = browser.execute_script(place, "h1")
        assert 0 <= top < bottom <= height
        assert len(browser.execute_script("return document.querySelector('h1').textContent")) > 20
        top, bottom = browser.execute_script(place, ".answer .chart > svg")
        assert bottom - top > 40
        assert min(bottom, height) - top >= (bottom - top) / 2, f"{name} at {width}: the chart is at {top} to {bottom}"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Any, file: Path, tmp_path: Path):
    forged = tmp_path / "forged.html"
    forged.write_text(file.read_text().replace("</main>", "<script>window.hacked = 1</script></main>"))
    opened(browser, forged)
    assert browser.execute_script("return window.hacked") is None
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_a_click_on_the_map_shows_its_norm_and_metric(browser: Any, file: Path):
    opened(browser, file)
    path, rows, before = curve(browser), table(browser), chosen(browser)
    click_on_the_map(browser)
    until(lambda: curve(browser) != path)
    assert table(browser) != rows
    now = chosen(browser)
    assert {now["site"], now["metric"]} != {before["site"], before["metric"]}
    assert now["cell"] == before["cell"]
    title = "return document.querySelector('.curves .role-title-text').textContent"
    assert browser.execute_script(title) == f"{now['metric']} at {now['site']}"
    axes = "return [...document.querySelectorAll('.curves .role-axis-title text')].map((one) => one.textContent)"
    assert browser.execute_script(axes) == ["Updates", worded(now["metric"])]
    assert worded(now["metric"]) != worded(before["metric"])


def test_a_view_is_shared_by_its_address(browser: Any, file: Path):
    opened(browser, file)
    path = curve(browser)
    click_on_the_map(browser)
    until(lambda: curve(browser) != path)
    address, shown, there = browser.execute_script("return location.href"), chosen(browser), table(browser)
    opened(browser, file)
    assert chosen(browser) != shown
    browser.get("about:blank")
    browser.get(address)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "yes")
    assert chosen(browser) == shown
    assert table(browser) == there


def test_one_bar_drives_every_chart_from_the_keyboard(browser: Any, file: Path):
    from selenium.webdriver.common.by import By

    opened(browser, file)
    assert [one.get_property("name") for one in browser.find_elements(By.CSS_SELECTOR, ".bar select")] == [
        "cell",
        "metric",
    ]
    assert browser.execute_script("return getComputedStyle(document.querySelector('.bar')).position") == "sticky"
    charts = (".cost", ".losses", ".curves", ".depth")
    before = [curve(browser, chart) if chart != ".cost" else table(browser, chart) for chart in charts]
    browser.find_element(By.CSS_SELECTOR, "select[name=cell]").send_keys("\ue015")  # the arrow down
    until(lambda: curve(browser) != before[2])
    now = [curve(browser, chart) if chart != ".cost" else table(browser, chart) for chart in charts]
    assert all(one != other for one, other in zip(before, now, strict=True))
    path = curve(browser)
    browser.find_element(By.CSS_SELECTOR, "select[name=site]").send_keys("\ue015")
    until(lambda: curve(browser) != path)
    assert browser.get_log("browser") == []


def test_a_link_to_a_detail_unfolds_it(browser: Any, file: Path):
    opened(browser, file)
    shown = "return document.getElementById('varies').open"
    assert not browser.execute_script(shown)
    browser.execute_script("document.querySelector('.facts a').click()")
    until(lambda: browser.execute_script(shown))


def test_numbers_and_pictures_are_saved(browser: Any, file: Path, tmp_path: Path):
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened(browser, file)
    browser.execute_script("for (const one of document.querySelectorAll('.cost button')) one.click()")
    wanted = [tmp_path / name for name in ("cost.csv", "cost-seeds.csv", "cost.svg")]
    until(lambda: all(one.exists() and one.stat().st_size for one in wanted))
    rows, seeds = (pd.read_csv(one) for one in wanted[:2])
    assert {"cell", "level", "backward", "cost", "low", "high", "p_adjusted", "n"} <= set(rows)
    assert len(seeds) == 3 * len(rows)
    drawn = wanted[2].read_text()
    assert drawn.startswith("<svg")
    assert "var(--" not in drawn
    assert browser.get_log("browser") == []


def test_all_columns_of_a_table_are_shown_when_asked_for(browser: Any, file: Path):
    opened(browser, file)
    heads = (
        "return [...document.querySelectorAll('.cost th')].filter((one) => one.checkVisibility())"
        ".map((one) => one.textContent)"
    )
    browser.execute_script("document.querySelector('.cost details').open = true")
    assert browser.execute_script(heads) == [
        "level",
        "backward",
        "loss",
        "exact's loss",
        "cost",
        "interval",
        "p_adjusted",
        "n",
    ]
    browser.execute_script("document.querySelector('.cost input').click()")
    assert {"effect", "p", "family"} < set(browser.execute_script(heads))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_readers_preference_and_paper_is_light(browser: Any, file: Path, scheme: str):
    opened(browser, file, scheme=scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    paper, label = {"light": ("255, 255, 255", "90, 95, 106"), "dark": ("21, 23, 27", "166, 171, 182")}[scheme]
    shown = [browser.execute_script(style, *of) for of in ((":root", "background-color"), (".mark-text text", "fill"))]
    assert shown == [f"rgb({paper})", f"rgb({label})"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert browser.execute_script(style, ":root", "background-color") == "rgb(255, 255, 255)"


@pytest.mark.rare
def test_a_click_on_a_runs_command_selects_it_whole(browser: Any, pages: dict[str, Path]):
    from selenium.webdriver.common.by import By

    opened(browser, pages["recorded"])
    browser.execute_script("document.getElementById('runs').open = true")
    cell = browser.find_element(By.CSS_SELECTOR, "#runs td.command")
    cell.click()
    assert browser.execute_script("return getSelection().toString()") == cell.text
    assert re.fullmatch("lnjac command recorded [0-9a-f]+", cell.text)
    assert browser.get_log("browser") == []


@pytest.mark.rare
def test_paper_has_every_chart_whole_and_the_details(browser: Any, pages: dict[str, Path], tmp_path: Path):
    """A study is at most 12 pages, and no chart is higher than one."""
    opened(browser, pages["diagnostics"], width=1000)
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    heights = browser.execute_script("return [...document.querySelectorAll('figure')].map((one) => one.offsetHeight)")
    assert max(heights) < 900
    rule = "return getComputedStyle(document.querySelector('figure')).breakInside"
    assert browser.execute_script(rule) == "avoid"
    shown = "return document.querySelector(arguments[0]).checkVisibility()"
    assert all(browser.execute_script(shown, f"#{name} > :last-child") for name in ("varies", "provenance", "computed"))
    assert not browser.execute_script(shown, ".numbers")


@pytest.mark.rare
def test_axe_finds_nothing(browser: Any, file: Path):
    axe = Path(os.environ.get("AXE_CORE") or str(files("axe_core_python") / "axe.min.js"))
    for scheme in ("light", "dark"):
        opened(browser, file, scheme=scheme)
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.execute_script(axe.read_text())
        found = browser.execute_async_script("axe.run().then((found) => arguments[0](found.violations))")
        assert [one["id"] for one in found] == []
