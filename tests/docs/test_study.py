"""The study's page says what its script prints from the tables beside it, and its other text holds no number of its own."""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.folders import with_column
from support.paths import STUDY, STUDY_PAGE
from support.scripts import script

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import compare
from lnjac.comparing.cost import cost
from lnjac.runs.folder import read_metadata, read_table, write_table


def script_of(folder: Path) -> Any:
    """The study's script as a module; it reads the tables beside it."""
    return script(folder / "study.py")


@pytest.fixture(scope="module")
def study() -> Any:
    return script_of(STUDY)


@pytest.mark.slow
def test_every_number_is_the_scripts(study: Any) -> None:
    text = STUDY_PAGE.read_text()
    assert study.filled(text) == text


def test_prose_has_no_measured_number(study: Any) -> None:
    text = STUDY_PAGE.read_text()
    for name in study.BLOCKS:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    assert "-->" not in text
    assert not re.findall(r"\d+\.\d+", text)


def test_an_altered_table_is_noticed(tmp_path: Path) -> None:
    """One run's loss, by a hundredth of a nat: the block of the primary comparison is no more the page's, and it alone."""
    study = script_of(shutil.copytree(STUDY, tmp_path / "study"))
    file = tmp_path / "study" / f"{study.SHORT}.runs.parquet"
    table, text = read_table(file), STUDY_PAGE.read_text()
    losses = table["val_loss_nats"].to_pylist()
    cell = zip(*(table[name].to_pylist() for name in ("method", "ln_backward", "attn_mode", "seed")), strict=True)
    losses[[*cell].index(("fa", "exact", "softmax", 1))] += 0.01
    write_table(file, with_column("val_loss_nats", pa.array(losses))(table), read_metadata(file))
    study.BLOCKS = {name: study.BLOCKS[name] for name in ("provenance", "primary")}
    before, after = (re.split(r"(<!-- /?primary -->)", page) for page in (text, study.filled(text)))
    assert len(before) == len(after) == 5
    assert [part for part, other in zip(before, after, strict=True) if part != other] == [before[2]]


def test_an_altered_page_is_noticed(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = STUDY_PAGE.read_text()
    monkeypatch.setattr(study, "BLOCKS", {"provenance": study.BLOCKS["provenance"]})
    altered = text.replace(f"| `{study.SHORT}` | 1", f"| `{study.SHORT}` | 91", 1)
    assert altered != text
    assert study.filled(altered) == text
    with pytest.raises(KeyError, match="provenance"):
        study.filled(text.replace("<!-- provenance -->", ""))


STE = "method == 'fa' and ln_backward == 'ste'"


def test_pooled_energies_differ_where_no_norm_does(study: Any) -> None:
    """docs/reading.md's example: pooled over norms, a share measures where the energy lies. compare does not pool."""
    layers = study.table(study.SHORT, "layers").query(f"{STE} and step == steps")
    layers["energy"] = layers["sum_B"] + layers["sum_C"]
    sums = layers.groupby(["attn_mode", "seed"])[["sum_B", "energy"]].sum()
    of_last = layers[layers["site"] == "ln_f"].set_index(["attn_mode", "seed"])["energy"] / sums["energy"]
    assert of_last.groupby("attn_mode").mean().round(2).to_dict() == {"sigmoid": 0.36, "softmax": 0.99}
    pooled = (sums["sum_B"] / sums["energy"]).unstack("attn_mode")
    found = stats.paired((pooled["softmax"] - pooled["sigmoid"]).to_numpy())
    assert (round(float(found.estimate), 4), round(float(found.p), 4)) == (0.0299, 0.0013)
    rows = compare(study.study(study.SHORT), "attn_mode", metrics=["radial_share"], where=STE).rows
    assert set(rows["site"]) == set(layers["site"])
    assert rows["difference"].abs().max() == pytest.approx(0.0063, abs=5e-5)
    assert rows["p_adjusted"].min() > 0.1


def test_one_difference_has_one_adjusted_p(study: Any) -> None:
    """It was 0.22, 0.24 and 0.57, by what else the command showed."""
    both = study.study(study.SHORT, study.METHODS)
    found = [
        cost(study.study(study.SHORT)),
        cost(both),
        cost(both, by="attn_mode", reference="sigmoid", where="method != 'frozen'"),
        cost(both, where="method == 'fa'"),
    ]
    rows = [
        part.differences.rows.query("ln_backward == 'center_scale@ln_1+ln_2'") for part in found if part.differences
    ]
    of_fa = [row[row["method"] == "fa"] if "method" in row else row for row in rows]
    values = [(round(float(row["p_adjusted"].item()), 9), int(row["family"].item())) for row in of_fa]
    assert values == [(pytest.approx(0.0828, abs=5e-5), 6)] * 4
    assert len({p for p, _ in values}) == 1
