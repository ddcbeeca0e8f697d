"""The site's configuration page holds every setting, and a site that loads anything from elsewhere fails to build."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError
from support.paths import ROOT
from support.scripts import script

from lnjac.config import compose, identity


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return script(ROOT / "docs" / "site.py")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method=dfa", "attn_mode=sigmoid"],
        ["method=kp", "optimizer=sgd"],
        ["ln_backward=ste", "tracker=tensorboard"],
    ],
)
def test_configuration_has_every_setting_with_its_value(site: ModuleType, words: list[str]) -> None:
    text = site.configuration()
    for column, value in identity.columns(compose.compose(*words)):
        if "." not in column.name or column.name.startswith(("eval.", "model.", "attn_mode.bias")):
            continue  # labels and resolved values
        rows = [line for line in text.splitlines() if line.startswith(f"| `{column.name}` |")]
        assert rows, f"{column.name} is on no line"
        if isinstance(value, (bool, int)):
            assert any(f"| `{str(value).lower()}` |" in row for row in rows), f"{column.name}={value}: {rows}"


def test_a_comment_beside_a_key_is_its_meaning(site: ModuleType) -> None:
    assert "| `model.block_size` | int | `64` | context length in tokens |" in site.configuration()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://example.org/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//example.org/x.css">'),
        ("a.css", "@import 'https://example.org/x.css';"),
        ("a.css", "body { background: url(https://example.org/x.png) }"),
    ],
)
def test_a_site_that_loads_from_elsewhere_fails(site: ModuleType, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PluginError, match=r"example\.org"):
        site.on_post_build(config={"site_dir": str(tmp_path)})


def test_a_site_may_link_elsewhere(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://example.org">x</a><script src="x.js"></script>')
    site.on_post_build(config={"site_dir": str(tmp_path)})


def test_links_between_files_become_links_between_pages(site: ModuleType) -> None:
    def shown(name: str, link: str) -> str:
        page = SimpleNamespace(parent="How-to", file=SimpleNamespace(src_uri=name), meta={})
        return str(site.on_page_markdown(f"[x]({link})", page=page))

    assert shown("index.md", "docs/study.md") == "[x](study.md)"
    assert shown("scaling.md", "../benchmarks/README.md#a") == "[x](benchmarks.md#a)"
    assert shown("benchmarks.md", "../docs/maths.md") == "[x](maths.md)"


def test_the_page_of_columns_is_written_from_the_code(site: ModuleType) -> None:
    assert site.columns() == (ROOT / "docs" / "columns.md").read_text()
