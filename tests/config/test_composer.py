"""A stranger's config is composed as Hydra composes it, word for word, though Hydra is asked once for many jobs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from lnjac.config.compose import Composer, resolved, searched, task_config

FILES = {
    "config": "defaults: [model: small, optional more: null, _self_]\nseed: 1\nlr: 0.1\nmust: ???\n"
    "double: ${lr}\nname: ${model.width}-${hydra:job.name}\npaths:\n  out: ${hydra:runtime.output_dir}\n"
    "sizes: [1, 2]\nnested: {a: {b: 1, c: null}}\n",
    "model/small": "width: 16\nname: small\n",
    "model/large": "defaults: [small, /part@inner: one, _self_]\nwidth: 64\ndepth: 3\n",
    "elsewhere/far/off": "y: 2\n",
    "part/one": "x: 1\n",
    "part/two": "# @package _global_\nlr: 7\nmodel: {width: 8}\n",
}


class Composing:
    """The composer, and Hydra's own way to compose a sweep's job."""

    def __init__(self, loader: Any) -> None:
        self.master = loader.load_configuration("config", ["hydra.job.name=app"], RunMode.MULTIRUN)
        self.asked: list[list[str]] = []
        self.hydra = lambda words: loader.load_sweep_config(self.master, words)
        self.composer = Composer(loader, lambda words: self.asked.append(words) or self.hydra(words))  # type: ignore[func-returns-value]
        self.composer.repository = searched(loader, self.master)


@pytest.fixture
def composing(tmp_path: Path) -> Iterator[Composing]:
    for name, text in FILES.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    config = tmp_path / "config.yaml"
    config.write_text(f"{config.read_text()}hydra: {{searchpath: ['file://{tmp_path}/elsewhere']}}\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        yield Composing(GlobalHydra.instance().config_loader())


@pytest.mark.parametrize("words", [
    [],
    ["lr=0.2", "seed=3", "must=x"],
    ["lr=null", "seed=${model.width}", "sizes=[3]", "nested.a.b=[1,{x:2}]"],
    ["model=large", "model.depth=9", "lr=0.2"],
    ["model=large", "model.inner.x=2", "+part@nested.part=one"],
    ["+part=two", "model.width=4", "lr=3"],
    ["lr=3", "+part=two", "model.width=4"],
    ["+extra=1", "++seed=4", "+new.deep=[1,2]", "++nested.a.z=1"],
    ["~lr"], ["~nested.a.b", "lr=1"], ["~model"], ["nested.a.b=5", "~nested.a"],
    ["model={width:9}", "model.width=2"], ["model.width=2", "model={width:9}"],
    ["nested={a:{b:7}}", "nested.a.b=8"], ["nested.a.b=8", "nested={a:{b:7}}"],
    ["hydra.job.name=b", "lr=2"], ["+far=off", "lr=2"], ["lr='1'", "must='a b,c=d'", "model.name=''"],
])  # fmt: skip
def test_as_hydra(words: list[str], composing: Composing) -> None:
    expected = composing.hydra(words)
    for _ in range(2):  # the second time from what is known
        composed = composing.composer.compose(words)
        found = composed.full()
        assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
        assert found._metadata == expected._metadata
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
        for key in ("lr", "seed", "absent", *(["double"] if "lr" in expected else [])):
            assert composed.value(key) == OmegaConf.select(expected, key)
    assert len(composing.asked) == 1


@pytest.mark.parametrize("words", [
    ["nosuch=1"], ["+seed=1"], ["model.nosuch=1"], ["model=nosuch"], ["lr@x=1"], ["~nosuch"], ["~lr=3"],
    ["nested.a.b.c=1"], ["+model=large"], ["lr=1", "model.depth=3"], ["part=one"], ["hydra.launcher.x=3", "lr=2"],
])  # fmt: skip
def test_what_hydra_refuses_is_refused_by_its_words(words: list[str], composing: Composing) -> None:
    with pytest.raises(Exception, match=r"\S") as expected:
        composing.hydra(words)
    with pytest.raises(type(expected.value)) as found:
        composing.composer.compose(words).full()
    assert str(found.value) == str(expected.value)


def test_hydra_is_asked_once_for_all_jobs_that_differ_in_values(composing: Composing) -> None:
    for seed in range(5):
        for member in ("small", "large"):
            composing.composer.compose([f"model={member}", f"seed={seed}", "+more=1"]).full()
    assert composing.asked == [["model=small"], ["model=large"]]


def test_a_config_is_resolved_to_plain_values_and_its_problems_are_named(composing: Composing) -> None:
    config = task_config(composing.composer.compose(["lr=1e-3", "sizes=[1,${seed}]"]).full())
    assert "hydra" not in config
    values, problems = resolved(config, ("paths",))
    assert values["sizes"] == [1, 1]
    assert values["double"] == 1e-3
    assert values["nested"] == {"a": {"b": 1, "c": None}}
    assert values["paths"] is None
    assert [said.split(":")[0] for said in problems] == ["must is missing", "name"]
    _, problems = resolved(config, ("must", "name"))
    assert [said.split(":")[0] for said in problems] == ["paths.out"]
