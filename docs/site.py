"""Write the generated parts of the site: the API, the command line, the configuration, and columns.md.

MkDocs calls the functions whose names begin with `on_` (mkdocs.yml, `hooks`).
"""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
LAUNCHERS = ROOT / "lnjac" / "sweeps" / "conf"

OUTSIDE = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are kept elsewhere in the repository."""

REPORTS = {"nanogpt-report.html": "studies/nanogpt/all.parquet"}
"""Reports that the site shows, and the tables that they are made from."""

FOLDERS = {
    "norms": "Measure a model",
    "gpt": "Train by another method",
    "runs": "Write and merge tables",
    "training": "Train and open runs",
    "config": "Compose a config",
    "comparing": "Compare runs",
    "reporting": "Report",
}
"""The folders that public names come from, in the order of the page."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are kept outside docs/, and the reports."""
    from mkdocs.structure.files import File

    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for name, tables in REPORTS.items():
        files.append(File.generated(config, name, content=_report(ROOT / tables)))
    return files


def _report(tables: Path) -> str:
    import lnjac

    with TemporaryDirectory() as folder:
        return lnjac.report(tables, output=Path(folder) / "report.html", title=tables.parent.name).html


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in a page's generated part, and turn links between files of the repository into links between pages."""
    if page.parent is None:  # a tab of one page has no list of pages to show beside it
        page.meta["hide"] = ["navigation"]
    parts = {"<!-- api -->": api, "<!-- commands -->": commands, "<!-- configuration -->": configuration}
    for marker, write in parts.items():
        if marker in markdown:
            markdown = markdown.replace(marker, write())
    home = (ROOT / OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    return re.sub(r"\]\(([^)#:\s]+)", lambda link: f"]({_page(home, link[1])}", markdown)


def _page(home: Path, link: str) -> str:
    """Return the page of the site that a relative link in a file of `home` leads to."""
    target = Path(os.path.normpath(home / link)).relative_to(ROOT).as_posix()
    names = {source: name for name, source in OUTSIDE.items()}
    return names.get(target, target.removeprefix("docs/"))


def on_post_build(config: Any) -> None:
    """Fail if a page would load anything from another host.

    Raises:
        PluginError: naming the first such file and address.
    """
    from mkdocs.exceptions import PluginError

    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'> ]+"
        r"|<link\b(?![^>]*rel=[\"']?(?:canonical|next|prev))[^>]*\bhref=[\"']?(?:https?:)?//[^\"'> ]+"
        r"|(?:@import\s+|url\()[\"']?(?:https?:)?//[^\"') ]+"
    )
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css") and (found := loaded.search(path.read_text())):
            raise PluginError(f"{path}: {found[0]} is loaded from another host: keep it in docs/ instead")


def api() -> str:
    """Return a heading for each folder and an mkdocstrings directive for each of its public names."""
    import lnjac

    homes: dict[str, list[str]] = {folder: [] for folder in FOLDERS}
    for name in lnjac.__all__:
        if not name.startswith("_"):
            homes[getattr(lnjac, name).__module__.split(".")[1]].append(name)
    return "\n\n".join(
        f"## {FOLDERS[folder]}\n\n" + "\n\n".join(f"::: lnjac.{name}" for name in names)
        for folder, names in homes.items()
        if names
    )


def commands() -> str:
    """Return Typer's own documentation of the `lnjac` command, with examples as blocks of code."""
    words = [sys.executable, "-m", "typer", "lnjac.cli.main", "utils", "docs", "--name", "lnjac"]
    env = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
    text = subprocess.run(words, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"^\*\*Usage\*\*:\n\n```console\n\$ (.*)\n```", r"```text\n\1\n```", text, flags=re.MULTILINE)
    text = re.sub(
        r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.MULTILINE
    )  # cut short; the contents list them
    return re.sub(r"\n\n\x08?\s*Example:\n((?:    .*\n)+)", _fenced, text.partition("\n")[2])


def _fenced(found: "re.Match[str]") -> str:
    lines = "\n".join(line.strip() for line in found[1].splitlines())
    return f"\n```sh\n{lines}\n```\n"


def configuration() -> str:
    """Return a section for conf/config.yaml, one for each config group, and in it a table for each member."""
    from lnjac.config.schema import GROUPS, RunConfig, field_types, folder_of

    types = field_types(RunConfig)
    top = yaml.safe_load((CONF / "config.yaml").read_text())
    plain = {key: value for key, value in top.items() if key not in ("defaults", "hydra")}
    parts = ["## Top level", _table(plain, _comments(CONF / "config.yaml"), RunConfig, "")]
    chosen = {group: member for entry in top["defaults"][:-1] for group, member in entry.items()}
    shape = yaml.safe_load((CONF / "model" / f"{chosen['model']}.yaml").read_text())
    chosen |= {f"model.{key}": value for key, value in shape.items()}
    for group in (*GROUPS, "hydra/launcher"):
        default = chosen.get(group, chosen.get(f"override {group}"))
        parts.append(f"## {group}")
        folder = (LAUNCHERS if group == "hydra/launcher" else CONF) / folder_of(group)
        for path in sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != default, path.stem)):
            values, comments = _member(path)
            cls = _class(values.pop("_target_", None), types.get(group))
            note = " (default)" * (path.stem == default)
            head = re.match(r"((?:# .*\n)*)", path.read_text())
            said = " ".join(line.removeprefix("# ") for line in head[1].splitlines()) if head else ""
            parts += [f"### {group}={path.stem}{note}", said, _table(values, comments, cls, f"{group}.")]
    return "\n\n".join(filter(None, parts))


def _class(target: str | None, fallback: Any) -> Any:
    if target is None or target.startswith("hydra_plugins"):
        return fallback
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _member(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a member's values and the comments beside them, those of the members that it builds on included."""
    own: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    values: dict[str, Any] = {}
    comments: dict[str, str] = {}
    for base in own.pop("defaults", []):
        more, said = _member(path.with_name(f"{base}.yaml"))
        values |= more
        comments |= said
    return values | own, comments | _comments(path)


def _comments(path: Path) -> dict[str, str]:
    """Return the comment beside each key of a yaml file, by the key's dotted name."""
    found, parents = {}, []
    for line in path.read_text().splitlines():
        if not (match := re.match(r"( *)([\w.]+):[^#]*?(?:\s#\s*(.*))?$", line)):
            continue
        parents[len(match[1]) // 2 :] = [match[2]]
        if match[3]:
            found[".".join(parents)] = match[3]
    return found


def _table(values: Mapping[str, Any], comments: Mapping[str, str], cls: Any, prefix: str) -> str:
    lines = [
        f"| `{prefix.replace('/', '.')}{key}` | {kind} | `{_yaml(value)}` | {comments.get(key, '').replace('|', 'or')} |"
        for key, kind, value in _leaves(values, cls)
    ]
    return "\n".join(["| key | type | value | meaning |", "| --- | --- | --- | --- |", *lines]) if lines else ""


def _leaves(values: Mapping[str, Any], cls: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the dotted key, the type and the value of each setting."""
    from lnjac.config.schema import field_types

    types = field_types(cls) if dataclasses.is_dataclass(cls) else {}
    for key, value in values.items():
        hint = types.get(key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
            yield from _leaves(value, hint, f"{prefix}{key}.")
        else:
            yield prefix + key, _kind(hint), value


def _kind(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(f"`{member.name}`" for member in hint)
    return str(hint) if get_origin(hint) else getattr(hint, "__name__", "")


def _yaml(value: Any) -> str:
    if value == "???":
        return "required"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def columns() -> str:
    """Return the text of columns.md, which is kept in the repository: every table's columns."""
    from lnjac.columns import VALUE
    from lnjac.diagnostics import catalogue
    from lnjac.runs import configs

    lines = [
        "# Columns",
        "",
        "Generated by `make docs` from the modules that compute them; a test keeps it equal. Symbols are",
        "those of [maths.md](maths.md). `layers` and `runs` also carry the run's config as typed columns, each under its",
        "config name: `seed`, `steps`, `attn_mode`, `attn_mode.bias`, `model.n_embd`, `ln_backward.sites`, ….",
        "",
        "The values of `key` columns name a row. `volatile` columns may differ between two measurements of one run.",
        "`layers` also has the pooling of several calls of one norm: a sum, a weighted mean, or a formula of pooled",
        "columns; where there is none, only a value on which all calls agree is kept. Norms are never pooled.",
        "",
    ]
    for table, own in {**catalogue.columns(), configs.CONFIGS: configs.COLUMNS}.items():
        pooled = any(column.pool for column in own)
        head = ["column", "dtype", "unit", "meaning", "role", *(["over calls"] if pooled else [])]
        lines += [f"## {table}", "", f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
        for c in own:
            cells = [f"`{c.name}`", c.dtype, c.unit, c.meaning, "" if c.role == VALUE else c.role]
            cells += [f"`{c.pool}`" if c.formula else c.pool] if pooled else []
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(more := _notes(table)), *([""] if more else [])]
    return "\n".join(lines)


def _notes(table: str) -> list[str]:
    """Return lines of Markdown: the cost of a table's diagnostics, and the values of its column `quantity`."""
    from lnjac.diagnostics.catalogue import BUILT_IN

    mine = [each for each in BUILT_IN if each.table == table]
    lines = [f"{each.__name__} costs {each.cost}." for each in mine]
    rows = [f"| `{name}` | {meaning} |" for each in mine for name, meaning in each.quantities.items()]
    return [*lines, "", "| quantity | meaning |", "| --- | --- |", *rows] if rows else lines


if __name__ == "__main__":
    sys.stdout.write(columns())
