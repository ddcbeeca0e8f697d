"""The study's commands, as its page states them, make exactly the runs of its tables: same configs, same identities."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.paths import ROOT, STUDY, STUDY_PAGE
from support.scripts import script

from lnjac.config.compose import compose
from lnjac.config.identity import diag_id, run_id

Sweeps = dict[str, dict[tuple[str, ...], list[int]]]
TABLES = sorted(path.name.removesuffix(".runs.parquet") for path in STUDY.glob("*.runs.parquet"))


def commands() -> Iterator[list[str]]:
    """Yield the words of each `python run.py` of the page, its shell variables filled in."""
    page = STUDY_PAGE.read_text().replace("\\\n", " ")
    variables = dict(re.findall(r'^ *([A-Z]+)="(.*)"$', page, re.MULTILINE))
    for line in re.findall(r"^ *python run\.py (.*)$", page, re.MULTILINE):
        yield shlex.split(re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], line))


def best_rates() -> Iterator[dict[str, str]]:
    """Yield the values of the command that stands for many: each cell's best rate, where no other sweep has run it."""
    study = script(STUDY / "study.py")
    for (method, mode, backward), rate in study.losses_by_rate().idxmin(axis=1).items():
        if method == "fa" or rate != 0.001:
            yield {"METHOD": method, "MODE": mode, "BACKWARD": backward, "BEST": str(rate)}


def jobs(words: list[str]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the words of each job of a command and its seed, as Hydra's own sweeper splits them."""
    (name,) = [word.partition("=")[2] for word in words if word.startswith("+experiment=")]
    params = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    typed = {word.partition("=")[0] for word in words}
    swept = [f"{key}={value}" for key, value in params.items() if key not in typed]
    for batch in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([*words, *swept]), None):
        for job in batch:
            (seed,) = [word for word in job if word.startswith("seed=")]
            yield tuple(word for word in job if word != seed), int(seed.removeprefix("seed="))


@pytest.fixture(scope="module")
def stated() -> Sweeps:
    """Each sweep's jobs by its name: the seeds of each config, by its words."""
    found: Sweeps = defaultdict(lambda: defaultdict(list))
    for words in commands():
        (sweep,) = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
        fillings = best_rates() if any("METHOD" in word for word in words) else [{}]
        for values in fillings:
            filled = [re.sub(r"=([A-Z]+)$", lambda name, v=values: f"={v[name[1]]}", word) for word in words]
            for job, seed in jobs([word for word in filled if not word.startswith("sweep=")]):
                found[sweep][job].append(seed)
    return found


def test_the_page_states_the_sweep_of_every_table(stated: Sweeps) -> None:
    assert len(TABLES) == 10
    assert sorted(stated) == TABLES


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_tables_runs_are_those_of_its_commands(name: str, stated: Sweeps) -> None:
    runs = pd.read_parquet(STUDY / f"{name}.runs.parquet")
    (data_sha256,) = runs["data_sha256"].unique()
    found = set()
    for words, seeds in stated[name].items():
        config = compose(*words)
        found |= {(run_id(replace(config, seed=seed), data_sha256), diag_id(config)) for seed in seeds}
    assert len(found) == len(runs)
    assert found == set(zip(runs["run_id"], runs["diag_id"], strict=True))
