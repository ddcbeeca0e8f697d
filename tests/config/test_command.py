"""The words that make a run again compose to the very same run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lnjac.config import identity
from lnjac.config.command import again, text
from lnjac.config.compose import compose

IDENTITIES = json.loads((Path(__file__).parents[1] / "golden" / "identities.json").read_text())

OWN = """
from dataclasses import dataclass

from lnjac.gpt.attention import Softmax


@dataclass
class Mine(Softmax):
    tag: str | None = None
    parts: list[str] | None = None
"""


def plain(*words: str) -> dict[str, Any]:
    """The config of these words as a run's files hold it."""
    found: dict[str, Any] = json.loads(json.dumps(identity.to_dict(compose(*words))))
    return found


def ids(*words: str) -> tuple[str, str]:
    config = compose(*words)
    return identity.run_id(config, "aa"), identity.diag_id(config)


@pytest.mark.parametrize("known", IDENTITIES, ids=lambda known: " ".join(known["overrides"]) or "defaults")
def test_the_words_compose_to_the_same_run(known: dict[str, Any]) -> None:
    found = again(plain(*known["overrides"]))
    assert ids(*found.words) == ids(*known["overrides"])
    assert not found.problems
    assert len(found.words) <= len(known["overrides"])


def test_what_follows_from_other_values_is_left_out() -> None:
    assert again(plain("attn_mode=sigmoid", "model.block_size=32")).words == [
        "attn_mode=sigmoid",
        "model.block_size=32",
    ]
    assert again(plain("device=cpu", "threads=1", "tracker=tensorboard")).words == []


@pytest.mark.parametrize("words", [
    ["eval.every=null", "optimizer.grad_clip=null"],
    ["data=text", "data.files=['a b.txt','1e3','null',\"it's\"]", "data.dir='12'"],
    ["optimizer.lr=1e-7", "model.eps=1", "ln_backward=scale", "ln_backward.sites=[]"],
    ["diagnostics.more=[]", "diagnostics.steps=[]"],
])  # fmt: skip
def test_odd_values_come_back(words: list[str]) -> None:
    found = again(plain(*words))
    assert (ids(*found.words), found.config and found.config.data) == (ids(*words), compose(*words).data)


def test_a_member_of_ones_own_comes_back(add_member: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_attention.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yaml = "_target_: own_attention.Mine\ntag: a\nparts: null\n"
    for name in ("mine", "1e3"):
        add_member("attn_mode", yaml, name)
        for value in ("'1e3'", "'null'", "null", "'true'", "'a,b=[c]'", "'it\\'s'"):
            words = [f"attn_mode={name}", f"attn_mode.tag={value}", "attn_mode.parts=['1','null',x]"]
            found = again(plain(*words))
            assert (ids(*found.words), found.problems) == (ids(*words), [])
    config = plain("attn_mode=mine", "attn_mode.tag=b")
    monkeypatch.undo()  # conf/ as it is without that member
    found = again(config)
    assert found.words == ["attn_mode=mine", "attn_mode.tag=b", "attn_mode.parts=null"]
    assert found.config is None
    assert "conf/attn_mode/mine.yaml is not here: write it, with `_target_: own_attention.Mine`" in found.problems[0]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))
)


@given(st.one_of(scalars, st.lists(scalars)))
def test_hydra_reads_the_value_that_was_written(value: Any) -> None:
    word = OverridesParser.create().parse_override(f"key={text(value)}")
    read = word.value()
    assert (type(read), not word.is_sweep_override()) == (type(value), True)
    assert read == value
    assert text(math.nan) == "nan"
