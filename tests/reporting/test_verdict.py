"""The sentences of a verdict: their wording on tables of every kind, and that they claim no more than the intervals do."""

import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from support.tables import run, study
from torch import Tensor, nn

import lnjac
from lnjac.comparing.compare import compare
from lnjac.comparing.floor import floor
from lnjac.errors import ConfigError
from lnjac.reporting.sentences import left_out, of_costs, of_differences, of_floor, of_scaling
from lnjac.reporting.verdict import verdict
from lnjac.reporting.wording import number
from lnjac.runs.folder import DIVERGED

LOSS = "val_loss_nats"
NOISE = (0.0, 0.01, -0.02, 0.015)
"""Of four seeds, so that numbers can be read off."""
WITH_BIGRAM = {"bigram_nats": 2.4}


def say(folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> list[str]:
    return verdict(study(folder, rows), **options).sentences


def arm(loss: float, noise: Sequence[float] = NOISE, **config: Any) -> list[dict[str, Any]]:
    """Runs of one config, a seed for each number of the noise."""
    return [run(seed, loss + more, **config) for seed, more in enumerate(noise, 1)]


def lost(seed: int, **config: Any) -> dict[str, Any]:
    return run(seed, math.nan, **config) | {"status": DIVERGED, "share": [0.1, 0.2]}


# Tables of every kind


def test_one_run(tmp_path: Path):
    assert say(tmp_path, [run(1, 2.3, steps_done=250)]) == [
        "The validation loss after 250 updates is 2.30 nats (one seed, so no interval).",
        "radial_share at 2 norms is 0.23 at blocks.0.ln_1 to 0.46 at ln_f (means over 1 seed).",
    ]


def test_one_run_beside_the_bigram(tmp_path: Path):
    assert say(tmp_path, [run(1, 2.3, **WITH_BIGRAM)])[0] == (
        "By validation loss fa is not shown to beat the bigram model (2.400 nats) (−0.100 nats, one seed, so no interval)."
    )


def test_runs_that_differ_in_their_seed_alone(tmp_path: Path):
    assert say(tmp_path, arm(2.3))[0] == "The validation loss is 2.301 nats (95 % 2.277 to 2.326, 4 seeds)."


def test_one_seed_a_level(tmp_path: Path):
    rows = [run(1, 2.3, attn_mode="softmax"), run(1, 2.5, attn_mode="sigmoid")]
    assert say(tmp_path, rows) == [
        "The validation loss is 0.200 nats lower under softmax than under sigmoid in one seed, which has no interval."
    ]


def test_two_levels(tmp_path: Path):
    rows = arm(2.3, attn_mode="softmax") + arm(2.5, (0, 0, 0.01, 0), attn_mode="sigmoid")
    assert say(tmp_path, rows) == [
        "The validation loss is 0.201 nats lower under softmax than under sigmoid (95 % 0.169 to 0.233, 4 paired seeds, "
        "adjusted p 0.00027)."
    ]


def test_two_levels_that_are_not_shown_to_differ(tmp_path: Path):
    rows = arm(2.3, attn_mode="softmax") + arm(2.31, (0, 0.01, 0.02, 0), attn_mode="sigmoid")
    assert say(tmp_path, rows) == [
        "The validation loss is not shown to differ between softmax and sigmoid: softmax − sigmoid, −0.016 nats "
        "(95 % −0.054 to +0.021, 4 paired seeds), is not clear of zero, and none larger than 0.054 nats is compatible with "
        "these seeds.",
        "An interval of ±0.0081 nats, half the difference, needs about 35 seeds if others spread as these do.",
    ]


def test_levels_of_a_setting_are_named_by_it(tmp_path: Path):
    rows = arm(2.3, model__n_embd=64) + arm(2.1, (0, 0, 0.01, 0), model__n_embd=128)
    assert say(tmp_path, rows)[0].startswith(
        "The validation loss is 0.199 nats lower at model.n_embd=128 than at model.n_embd=64 (95 % "
    )


BACKWARDS = ("exact", "center_scale", "projected", "ste", "scale", "radial_scale", "center", "radial")


def test_seven_backwards(tmp_path: Path):
    rows = [
        row
        for i, backward in enumerate(BACKWARDS)
        for row in arm(2 + i / 10, [i * x for x in NOISE], ln_backward=backward)
    ]
    assert say(tmp_path, rows) == [
        "Leaving the radial part out (center_scale) costs 0.101 nats (95 % 0.077 to 0.126, 4 paired seeds).",
        "The 7 costs of 7 backwards are 0.10 to 0.71 nats, clear of zero in 7 of 7 (adjusted p below 0.05), the largest of "
        "those for radial: +0.71 (95 % 0.54 to 0.88, 4 paired seeds, adjusted p 0.0068).",
    ]


def test_the_difference_of_one_cost(tmp_path: Path):
    rows = [
        row
        for mode, cost in (("softmax", 0.5), ("sigmoid", 0.45))
        for row in (*arm(2, attn_mode=mode), *arm(2 + cost, (0, 0.1, 0, 0), attn_mode=mode, ln_backward="center_scale"))
    ]
    rows[-1] |= {LOSS: 2.2}
    (said, needed) = say(tmp_path, rows)
    assert said == (
        "Leaving the radial part out (center_scale) costs 0.52 nats under softmax (95 % 0.45 to 0.60, 4 paired seeds) and "
        "0.41 nats under sigmoid (0.16 to 0.66); the difference softmax − sigmoid, +0.11 nats (−0.09 to +0.31), is not clear "
        "of zero, and none larger than 0.32 nats is compatible with these seeds."
    )
    assert (
        needed == "An interval of ±0.056 nats, half the difference, needs about 22 seeds if others spread as these do."
    )


def test_widths_have_a_slope(tmp_path: Path):
    rows = [row for d in (64, 128, 256) for row in arm(3 * d**-0.5, (0, 1e-4, -1e-4), model__n_embd=d)]
    assert say(tmp_path, rows) == [
        "The validation loss falls as model.n_embd to the power −0.50000 (95 % −0.50048 to −0.49952, 3 seeds)."
    ]
    rows = [row | {"attn_mode": mode} for mode in ("softmax", "sigmoid") for row in rows]
    said = say(tmp_path, rows)
    assert said[0] == "The 3 differences softmax − sigmoid in validation loss are 0 nats: identical in 3 paired seeds."
    assert [line.split(" falls as ")[0] for line in said[1:]] == [
        "The validation loss under softmax",
        "The validation loss under sigmoid",
    ]


def test_steps_whose_loss_does_not_follow_a_line(tmp_path: Path):
    losses = {10: 3.0, 100: 2.0, 1000: 1.99}
    rows = [row for steps, loss in losses.items() for row in arm(loss, (0, 1e-2, -1e-2), steps=steps)]
    (said,) = say(tmp_path, rows)
    assert said.startswith("The validation loss falls as steps to the power −0.0")
    assert said.endswith("; a straight line does not describe the points, so read them and not the slope.")


def test_two_points_say_nothing_of_a_line(tmp_path: Path):
    rows = [row for d in (64, 128) for row in arm(3 * d**-0.5, (0, 1e-3, -1e-3), model__n_embd=d)]
    found = lnjac.scaling(study(tmp_path, rows), "model.n_embd", metrics=[LOSS], table="runs")
    assert of_scaling(found)[0].endswith("; two points cannot show whether a line describes it.")


def test_a_hundred_levels_are_ranked_and_not_compared(tmp_path: Path):
    rows = [row for i in range(100) for row in arm(2 + i / 100, (0, 0), optimizer__lr=(i + 1) / 1000)]
    assert say(tmp_path, rows) == [
        "optimizer.lr has 100 levels: the validation loss is 2.000 nats at optimizer.lr=0.001 to 2.990 nats at "
        "optimizer.lr=0.1 (means over 2 seeds); which of them differ is not tested: choose some by --where, or a --reference."
    ]


def test_many_levels_are_a_range_with_the_largest(tmp_path: Path):
    rows = [row for i in range(6) for row in arm(2 + i**2 / 100, [x * (i == 1) for x in NOISE], optimizer__lr=i / 10)]
    rows = [row | {LOSS: row[LOSS] + row["seed"] * i / 1000} for i, row in enumerate(rows)]
    said = say(tmp_path, rows)[0]
    assert said.startswith("The 15 differences between levels of optimizer.lr in validation loss are 0.0")
    assert re.search(r"clear of zero in \d+ of 15 \(adjusted p below 0\.05\), the largest of those for 0\.\d − 0", said)


def test_a_loss_that_is_not_finite_is_no_number(tmp_path: Path):
    rows = [*arm(2.5, **WITH_BIGRAM), run(9, math.inf, **WITH_BIGRAM)]
    said = say(tmp_path, rows)
    assert "4 seeds" in said[0]
    assert said[1].startswith("The validation loss is 2.501 nats (95 % 2.477 to 2.526, 4 seeds)")


def test_all_diverged(tmp_path: Path):
    assert say(tmp_path, [lost(1)]) == ["The one run diverged: there is no number to compare."]
    rows = [lost(seed, attn_mode=mode) for mode in ("softmax", "sigmoid") for seed in (1, 2)]
    assert say(tmp_path, rows) == ["All 4 runs diverged: there is no number to compare."]


def test_a_level_that_diverged_is_not_compared(tmp_path: Path):
    rows = [*arm(2.0, attn_mode="softmax"), *(lost(seed, attn_mode="sigmoid") for seed in (1, 2, 3, 4))]
    assert say(tmp_path, rows) == [
        "No two levels of attn_mode can be compared in validation loss: 4 of 4 runs diverged under sigmoid.",
        "4 of 8 runs diverged and are in no mean.",
    ]


def test_exact_runs_that_diverged_leave_no_cost(tmp_path: Path):
    rows = [*arm(2.0, ln_backward="ste"), *(lost(seed) for seed in (1, 2, 3, 4))]
    assert say(tmp_path, rows) == [
        "No backward can be compared with the exact one in any seed.",
        "4 of 8 runs diverged and are in no mean.",
    ]


def test_a_diverged_run_is_counted(tmp_path: Path):
    rows = [*arm(2.0, attn_mode="softmax"), *arm(2.5, attn_mode="sigmoid")]
    rows[0] = lost(1, attn_mode="softmax")
    first, *_, last = say(tmp_path, rows)
    assert "3 paired seeds" in first
    assert last == "1 of 8 runs diverged and is in no mean."


def test_levels_that_are_identical_bit_for_bit(tmp_path: Path):
    rows = [*arm(2.0, attn_mode="softmax"), *arm(2.0, attn_mode="sigmoid")]
    assert say(tmp_path, rows) == [
        "The validation loss is identical under softmax and under sigmoid in all 4 paired seeds."
    ]
    rows = [*arm(2.0), *arm(2.0, ln_backward="center_scale")]
    assert say(tmp_path, rows) == [
        "Leaving the radial part out (center_scale) costs nothing (identical in all 4 paired seeds)."
    ]


def test_a_difference_that_is_the_same_in_every_seed_has_no_interval(tmp_path: Path):
    rows = [*arm(2.0, (0, 0.5, 1), attn_mode="softmax"), *arm(2.25, (0, 0.5, 1), attn_mode="sigmoid")]
    assert say(tmp_path, rows) == [
        "The validation loss is 0.250 nats lower under softmax than under sigmoid, the same in each of 3 paired seeds."
    ]


def test_seeds_that_one_level_lacks_are_counted(tmp_path: Path):
    rows = [*arm(2.0, (0, 0.1, 0.3, 0.2), attn_mode="softmax"), *arm(2.5, (0, 0, 0.1), attn_mode="sigmoid")]
    first, *_, last = say(tmp_path, rows)
    assert "3 paired seeds" in first
    assert last == "1 seed at only one of two levels is left out."


def test_levels_without_a_common_seed_are_called_unpaired(tmp_path: Path):
    rows = [*arm(2.0, attn_mode="softmax"), *(row | {"seed": row["seed"] + 9} for row in arm(2.5, attn_mode="sigmoid"))]
    assert "4 seeds a level, unpaired" in say(tmp_path, rows)[0]


def test_columns_that_move_together_are_named(tmp_path: Path):
    rows = [*arm(2.0, attn_mode="softmax"), *arm(2.5, attn_mode="sigmoid", optimizer__lr=0.1)]
    assert say(tmp_path, rows)[-1] == (
        "optimizer.lr changes together with attn_mode, so their effects cannot be told apart."
    )


def test_recorded_runs_of_another_model_are_compared_in_a_column_of_their_norms(tmp_path: Path):
    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x).square().mean(), len(x)

    for width in (4, 8):
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 2))
            with lnjac.record(tmp_path / f"{width}-{seed}", config={"width": width}, seed=seed) as recorded:
                recorded.layers(lnjac.probe(model).measure([torch.randn(16, width)], loss), 10)
    found = compare(tmp_path, "width", metrics=["radial_share"]).rows.iloc[0]
    said = verdict(tmp_path).sentences[0]
    assert said.startswith("The radial_share at 1 is not shown to differ between width=8 and width=4: 8 − 4, −0.0")
    assert close(re.search(rf"8 − 4, {NUMBER}", said)[1], found["difference"])  # type: ignore[index]
    assert re.fullmatch(r"radial_share at 1 is 0\.\d+\.", " ".join(verdict(tmp_path / "4-1").sentences))


def test_bad_input_is_named(tmp_path: Path):
    table = study(tmp_path, arm(2.0, attn_mode="softmax") + arm(2.5, attn_mode="sigmoid"))
    for options, said in (
        ({"by": "atn_mode"}, "atn_mode"),
        ({"where": "seed > 99"}, "seed > 99"),
        ({"margin": -1}, "-1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            verdict(table, **options)


# The floor


def floored(folder: Path, *losses: tuple[str, float]) -> str:
    """The first sentence on runs of fa and of a frozen body, with a surrogate, under each mode."""
    noise = {"fa": NOISE, "frozen": (0, 0, 0, 0.001)}
    rows = [
        row
        for mode, loss in losses
        for method, of in (("fa", loss), ("frozen", 2.5))
        for backward in ("exact", "center_scale")
        for row in arm(of + (backward != "exact"), noise[method], attn_mode=mode, method=method, ln_backward=backward)
    ]
    return say(folder, rows)[0]


def test_the_floor_in_three_wordings(tmp_path: Path):
    start = "With the exact backward"
    better = start + " fa beats a frozen body{} (by 0.099 nats, 95 % 0.075 to 0.123, 4 paired seeds)"
    unclear = (
        "With the exact backward fa is not shown to beat a frozen body{} (95 % −0.023 to +0.025 nats, 4 paired seeds)"
    )
    nothing = "training the body has earned nothing yet that these seeds show"
    nothing += ", so a cost here is harm done, not learning lost."
    worse = " and is worse under sigmoid (by 0.101 nats, 0.077 to 0.125)"
    assert floored(tmp_path, ("softmax", 2.4)) == f"{better.format('')}."
    assert floored(tmp_path, ("softmax", 2.5)) == f"{unclear.format('')}: {nothing}"
    assert floored(tmp_path, ("softmax", 2.6)) == (
        "With the exact backward fa is worse than a frozen body (by 0.101 nats, 95 % 0.077 to 0.125, 4 paired seeds): "
        + nothing.replace(" that these seeds show", "")
    )
    both = floored(tmp_path, ("softmax", 2.5), ("sigmoid", 2.6))
    assert both == f"{unclear.format(' under softmax')}{worse}: {nothing}"
    both = floored(tmp_path, ("softmax", 2.4), ("sigmoid", 2.6))
    assert both == (
        f"{better.format(' under softmax')}{worse}: where it is not beaten, a cost is harm done, not learning lost."
    )


def test_the_frozen_runs_are_the_floor_even_where_they_are_not_chosen(tmp_path: Path):
    rows = [*arm(2.4), *arm(3.0, ln_backward="ste"), *arm(2.5, (0, 0, 0, 0.001), method="frozen")]
    assert say(tmp_path, rows, where="method == 'fa'")[0].startswith(
        "With the exact backward fa beats a frozen body (by "
    )


def test_the_bigram_is_the_floor_without_frozen_runs(tmp_path: Path):
    rows = [
        *arm(2.5, attn_mode="softmax", **WITH_BIGRAM),
        *arm(2.39, attn_mode="sigmoid", **WITH_BIGRAM),
    ]
    assert say(tmp_path, rows)[0] == (
        "By validation loss fa is worse than the bigram model (2.400 nats) under softmax (by 0.101 nats, 95 % 0.077 to "
        "0.126, 4 seeds) and is not shown to beat it under sigmoid (−0.033 to +0.016 nats): the loss is no evidence of "
        "learning more than pairs of tokens."
    )


def test_many_cells_are_counted_against_the_floor(tmp_path: Path):
    rows = [row for i, method in enumerate("abcdef") for row in arm(2.2 + i / 10, method=method, **WITH_BIGRAM)]
    assert say(tmp_path, rows)[0] == (
        "By validation loss 2 of 6 cells beat the bigram model (2.400 nats) with a (by 0.199 nats, 95 % 0.174 to 0.223, "
        "4 seeds) and with b (by 0.099 nats, 0.074 to 0.123), 1 of 6 cells are not shown to beat it with c (−0.023 to "
        "+0.026 nats) and 3 of 6 cells are worse (0.101 to 0.301 nats, 95 % intervals within 0.077 to 0.326)."
    )


# Words


def test_a_surrogate_in_words():
    assert left_out("center_scale@ln_1+ln_2") == "leaving the radial part out at ln_1 and ln_2 (center_scale@ln_1+ln_2)"
    assert left_out("ste") == "leaving all three parts out (ste)"
    assert left_out("scale") == "leaving the centring and the radial part out (scale)"
    assert left_out("mine[x=1]") == "using the backward mine[x=1]"


@pytest.mark.parametrize(
    ("value", "places", "said"),
    [
        (-0.0393, 3, "−0.039"),
        (0.0, 3, "0.000"),
        (0.0004, 3, "0.0004"),
        (-2e-9, 3, "−2e−09"),
        (1234.4, 0, "1234"),
        (1e-9, 10, "1.0e−09"),
        (1.2345e-5, 9, "1.2345e−05"),
    ],
)
def test_numbers(value: float, places: int, said: str):
    assert number(value, places) == said


# Nothing is claimed that the interval does not say


# no shrinking: an example that fails is small enough, and each one writes tables
quick = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
NUMBER = r"([+−]?\d+(?:\.\d+)?(?:e[+−]?\d+)?)"
samples = st.lists(st.integers(-40, 40), min_size=2, max_size=7).filter(lambda x: len(set(x)) > 1)
scales = st.sampled_from([1e-4, 0.003, 0.01, 0.7])


def read(text: str) -> float:
    return float(text.replace("−", "-"))


def close(said: str, value: float) -> bool:
    """Whether a number is said as precisely as it is written."""
    digits = said.split("e")[0].partition(".")[2]
    step = 10.0 ** -len(digits) * (10 ** float(said.replace("−", "-").split("e")[1]) if "e" in said else 1)
    return abs(read(said) - value) <= 0.5001 * step


def t_interval(x: "np.ndarray[Any, Any]", confidence: float = 0.95) -> tuple[float, float, float]:
    test = scipy.stats.ttest_1samp(x, 0)
    low, high = test.confidence_interval(confidence)
    return float(low), float(high), float(test.pvalue)


@pytest.mark.slow
@quick
@given(samples, scales, st.integers(-60, 60), st.sampled_from([None, 0.02, 0.3]))
def test_a_difference_claims_what_its_interval_says(noise: list[int], scale: float, shift: int, margin: float | None):
    x = scale * np.array(noise) + scale * shift
    rows = [row for mode, of in (("softmax", x), ("sigmoid", 0 * x)) for row in arm(5.0, list(of), attn_mode=mode)]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(study(Path(folder), rows), "attn_mode", metrics=[LOSS], table="runs", margin=margin)
    said = " ".join(of_differences(found))
    mean, (low, high, p) = x.mean(), t_interval(x)
    n = f"{len(x)} paired seeds"
    if low <= 0 <= high:
        pattern = (
            rf"not shown to differ.*, {NUMBER} nats \(95 % {NUMBER} to {NUMBER}, {n}\).* larger than {NUMBER} nats"
        )
        estimate, first, last, bound = re.search(pattern, said).groups()  # type: ignore[union-attr]
        assert close(estimate, mean)
        assert close(first, low)
        assert close(last, high)
        assert read(bound) >= max(-low, high) * (1 - 1e-9)
        assert "higher" not in said
        assert "lower" not in said
    else:
        pattern = (
            rf"is {NUMBER} nats (lower|higher) under softmax than under sigmoid \(95 % {NUMBER} to {NUMBER}, {n}, adj"
        )
        size, way, first, last = re.search(pattern, said).groups()  # type: ignore[union-attr]
        assert p < 0.05
        assert (way == "lower") == (high < 0)
        assert close(size, abs(mean))
        assert close(first, min(abs(low), abs(high)))
        assert close(last, max(abs(low), abs(high)))
        assert read(first) > 0
    if margin is not None:
        inner_low, inner_high, _ = t_interval(x, 0.9)
        equivalent, different = -margin < inner_low and inner_high < margin, inner_low > margin or inner_high < -margin
        assert ("levels are equivalent" in said) == equivalent
        assert ("levels are different" in said) == different
        assert ("difference is undecided" in said) == (not equivalent and not different)


@pytest.mark.slow
@settings(quick, max_examples=10)
@given(st.lists(samples.map(lambda x: (x * 4)[:4]), min_size=3, max_size=5), scales, st.integers(0, 30))
def test_many_differences_are_counted_as_holm_does(noise: list[list[int]], scale: float, shift: int):
    """Random levels; every pair is tested again by scipy, and all together adjusted by statsmodels."""
    values = [scale * (np.array(of) + shift * i + np.array([0, 0.1, 0.3, 0.7]) * i) for i, of in enumerate(noise)]
    rows = [row for i, of in enumerate(values) for row in arm(9.0, list(of), optimizer__lr=float(i + 1))]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(study(Path(folder), rows), "optimizer.lr", metrics=[LOSS], table="runs")
    said = of_differences(found)[0]
    apart = [values[j] - values[i] for i in range(len(values)) for j in range(i + 1, len(values))]
    tests = [t_interval(x) for x in apart]
    adjusted = multipletests([p for *_, p in tests], method="holm")[1]
    clear = [
        x.mean()
        for x, (low, high, _), p in zip(apart, tests, adjusted, strict=True)
        if p < 0.05 and not low <= 0 <= high
    ]
    pair = rf"{NUMBER} to {NUMBER}"
    lowest, highest = re.search(rf"in validation loss are {pair} nats", said).groups()  # type: ignore[union-attr]
    assert close(lowest, min(x.mean() for x in apart))
    assert close(highest, max(x.mean() for x in apart))
    if clear:
        n, of = re.search(r"clear of zero in (\d+) of (\d+) ", said).groups()  # type: ignore[union-attr]
        assert (int(n), int(of)) == (len(clear), len(apart))
        largest = re.search(rf"the largest of those for .*: {NUMBER} \(", said)[1]  # type: ignore[index]
        assert close(largest, max(clear, key=abs))
    else:
        assert "none is clear of zero" in said
        bound = read(re.search(rf"excludes differences larger than {NUMBER} nats", said)[1])  # type: ignore[index]
        assert bound >= max(max(-low, high) for low, high, _ in tests) * (1 - 1e-9)


@pytest.mark.slow
@quick
@given(samples, samples, scales, st.integers(-30, 60))
def test_costs_claim_what_their_intervals_say(first: list[int], second: list[int], scale: float, shift: int):
    n = min(len(first), len(second))
    costs = {"softmax": scale * (np.array(first[:n]) + shift), "sigmoid": scale * np.array(second[:n])}
    rows = [
        row
        for mode, x in costs.items()
        for row in (
            *arm(5.0, [0.0] * n, attn_mode=mode),
            *arm(5.0, list(x), attn_mode=mode, ln_backward="center_scale"),
        )
    ]
    spread = [x.std() for x in (*costs.values(), costs["softmax"] - costs["sigmoid"])]
    if n < 2 or min(spread) < 1e-6:
        return
    with tempfile.TemporaryDirectory() as folder:
        said = of_costs(lnjac.cost(study(Path(folder), rows)))[0]
    for mode, x in costs.items():
        low, high, p = t_interval(x)
        paid = re.search(rf"(costs |saves |and )?{NUMBER} nats under {mode}", said)
        unclear = re.search(rf"is not shown to cost or save anything under {mode} \({NUMBER} nats", said)
        assert (paid is None) == (low <= 0 <= high) == (unclear is not None)
        if paid:
            assert p < 0.05
            assert close(paid[2], abs(x.mean()))
            assert read(paid[2]) > 0
            verbs = re.findall(r"(costs|saves) ", said[: paid.end()])
            assert verbs[-1] == ("costs" if x.mean() > 0 else "saves")
    x = costs["softmax"] - costs["sigmoid"]
    low, high, p = t_interval(x)
    tail = said.split("; the difference softmax − sigmoid, ")[1]
    assert close(re.match(NUMBER, tail)[1], x.mean())  # type: ignore[index]
    assert ("is not clear of zero" in tail) == (low <= 0 <= high)
    assert ("is clear of zero (adjusted p" in tail) == (p < 0.05)


@pytest.mark.slow
@quick
@given(samples, samples, scales, st.integers(-60, 60))
def test_the_floor_claims_what_its_interval_says(first: list[int], second: list[int], scale: float, shift: int):
    n = min(len(first), len(second))
    apart = scale * (np.array(first[:n]) - np.array(second[:n]) + shift)
    if n < 2 or apart.std() < 1e-6:
        return
    own, frozen = scale * (np.array(first[:n]) + shift), scale * np.array(second[:n])
    rows = [*arm(5.0, list(own)), *arm(5.0, list(frozen), method="frozen")]
    with tempfile.TemporaryDirectory() as folder:
        (said,) = of_floor(floor(study(Path(folder), rows)))
    low, high, _ = t_interval(apart)
    assert ("is not shown to beat a frozen body" in said) == (low <= 0 <= high)
    assert ("beats a frozen body" in said) == (high < 0)
    assert ("is worse than a frozen body" in said) == (low > 0)
    assert ("that these seeds show" in said) == (low <= 0 <= high)
    ends = (-high, -low) if high < 0 else (low, high)
    found = re.search(rf"95 % {NUMBER} to {NUMBER}( nats)?, {n} paired seeds", said)
    assert found
    assert close(found[1], ends[0])
    assert close(found[2], ends[1])
