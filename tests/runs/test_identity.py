"""A stranger's config: its identity and its columns, and the line that refuses what cannot be either."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lnjac.errors import ConfigError
from lnjac.runs.identity import identify

CONFIG = {"lr": 0.1, "model": {"width": 8, "norms": ["a", "b"], "tied": False}, "note": None, "seed": 1}


def run_id(config: Any, **more: Any) -> str:
    return identify(config, **more).identity["run_id"]


def test_the_identity_of_a_config_never_changes() -> None:
    assert identify(CONFIG).identity == {"run_id": "61c33d64d71826f9", "diag_id": "44136fa355b3678a"}


def test_each_value_is_a_typed_column() -> None:
    config = {**CONFIG, "layers": [{"width": 1}], "sizes": (2, None)}
    found = {column.name: (column.dtype, value) for column, value in identify(config).columns}
    assert found == {
        "lr": ("float64", 0.1),
        "model.width": ("int64", 8),
        "model.norms": ("string", "a+b"),
        "model.tied": ("bool", False),
        "note": ("string", None),
        "seed": ("int64", 1),
        "layers": ("string", '[{"width": 1}]'),
        "sizes": ("string", "2+None"),
    }


def test_order_and_class_of_a_config_are_no_part_of_the_identity() -> None:
    resolved = OmegaConf.create({**CONFIG, "model": {**CONFIG["model"], "width": "${twice}"}, "twice": 8})
    one = run_id(dict(reversed(CONFIG.items())))
    assert one == run_id(CONFIG) == run_id({k: v for k, v in CONFIG.items() if k != "seed"}, seed=1)
    assert run_id(OmegaConf.create(CONFIG)) == one
    assert run_id(resolved) == run_id({**CONFIG, "twice": 8})
    assert len({one, run_id(CONFIG | {"seed": 2}), run_id(CONFIG | {"lr": 0.2})}) == 3


def test_execution_keys_are_no_part_of_identity_or_columns() -> None:
    more = {"device": "cuda", "paths": {"data": "/data", "out": {"root": Path("/out")}}, "a": {"workers": 4}}
    found = identify({**CONFIG, **more}, execution=("device", "paths", "paths.data", "a.workers"))
    assert found.identity == identify({**CONFIG, "a": {}}).identity
    assert [column.name for column, _ in found.columns] == [column.name for column, _ in identify(CONFIG).columns]
    assert found.execution == {"device": "cuda", "paths": more["paths"], "a.workers": 4}
    assert identify({"seed": 1, "device": "cpu"}, execution="device").config == {"seed": 1}


@pytest.mark.parametrize(
    ("config", "execution", "said"),
    [
        ({"seed": 1, "model": {"path": Path("x")}}, (), "model.path=.* is not plain: .* name it in execution="),
        ({"seed": 1, "lr": torch.tensor(0.1)}, (), "lr=.* is not plain: give text, a number"),
        ({"seed": 1, "lr": [torch.tensor(0.1)]}, (), "lr=.* is not plain"),
        ({"seed": 1, "big": 2**63}, (), "big=.* is not plain"),
        ({"seed": 1, "model": {3: 1}}, (), "key model.3 is no text: write it as '3'"),
        ({"seed": 1, "site": "x"}, (), "the config has site, as another column is called too"),
        ({"seed": 1, "device": "cpu"}, (), "the config has device, as another column is called too: rename"),
        ({"seed": 1, "a.b": 1, "a": {"b": 2}}, (), "the config has a.b, as another column"),
        ({"lr": 1}, (), r"the config has no seed: give record\(…, seed=1\)"),
        ({"seed": 1.0}, (), "seed=1.0 is no whole number"),
        ({"seed": True}, (), "seed=True is no whole number"),
        ({"seed": None}, (), "seed=None is no whole number"),
        ({"seed": 1}, ("seed",), "execution names seed, which pairs the runs"),
        ({"seed": 1, "path": "x"}, ("paths",),
         "execution names paths, which the config does not have: its keys are seed, path"),
        ({"seed": 1, "a": {"b": "/data", "c": ["x", "~/y"]}, "e": r"C:\z"}, (),
         r"paths \(a.b=/data, a.c=~/y, e=C:\\z\), .*: name them by execution=\['a.b', 'a.c', 'e'\], or"),
        ([1], (), r"config is a list, which is no mapping: give a dict, such as vars\(args\)"),
    ],
)  # fmt: skip
def test_what_can_be_no_identity_is_refused_in_one_line(config: Any, execution: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        identify(config, execution=execution)
    (line,) = str(caught.value).splitlines()
    assert re.search(said, line)


def test_each_problem_has_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        identify({"site": "x", "root": "/data", "lr": object()}, execution=["nothing"])
    assert len(str(caught.value).splitlines()) == 5


def test_relative_paths_and_slashes_within_a_text_are_plain() -> None:
    assert identify({"seed": 1, "data": "data/x", "name": "org/model", "note": "a /b"}).config["data"] == "data/x"
