"""The layering of the modules, held as a test: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = [
    {"tables", "escape"},
    {"config", "streams", "tracking"},
    {"runs"},
    {
        "jacobian",
        "attention",
        "credit",
        "play",
        "summary",
        "console",
        "interruption",
        "stats",
        "where",
        "pooling",
        "sources",
        "doubts",
    },
    {"norm", "graph", "data", "optim", "pile", "placing", "distribution", "figures"},
    {"reading"},
    {"sweep"},
    {"plan", "design", "diff", "page"},
    {"compare"},
    {"views"},
    {"report"},
    {"capture", "gpt"},
    {"analyse", "mechanism", "progress", "checkpoint", "switch"},
    {"alignment", "swap"},
    {"train", "replay"},
    {"__init__"},
    {"cli_compare"},
    {"cli_report"},
    {"cli"},
    {"__main__"},
]
"""From the ground up: a module imports only what stands on a lower floor."""

READING = [
    "lnjac",
    *(f"lnjac.{name}" for name in ("cli", "compare", "diff", "report", "sweep", "summary", "runs", "tables", "config")),
]


def imported(path: Path, *, lazily: bool = True) -> set[str]:
    """Every module a file imports: `lnjac.x` as lnjac.x, others by their first name."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lnjac":
            found |= {f"lnjac.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(root: Path) -> list[Path]:
    return sorted((root / "lnjac").glob("*.py"))


def test_every_module_has_a_floor(root: Path) -> None:
    assert {path.stem for path in modules(root)} == set().union(*LAYERS)


def test_imports_point_down(root: Path) -> None:
    floor = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in modules(root):
        if path.stem == "__init__":
            continue
        for name in imported(path):
            if not name.startswith("lnjac."):
                continue
            target = name.split(".")[1]
            if target == "__version__":  # read at run time
                continue
            assert floor[target] < floor[path.stem], f"{path.stem} imports {target}, which does not lie below it"


def test_only_three_places_know_hydra(root: Path) -> None:
    for path in modules(root):
        used = {name.split(".")[0] for name in imported(path)} & {"hydra", "omegaconf"}
        assert not used or path.stem == "config", f"{path.stem} imports {used}"


def test_measuring_knows_no_training(root: Path) -> None:
    for name in ("jacobian", "capture", "analyse"):
        used = imported(root / "lnjac" / f"{name}.py")
        assert not used & {f"lnjac.{other}" for other in ("gpt", "credit", "data", "train", "optim", "attention")}


@pytest.mark.parametrize("module", READING)
def test_reading_starts_without_torch(root: Path, module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
