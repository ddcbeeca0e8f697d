"""Turn results of `lnjac.comparing` into sentences that claim what an interval says, and no more.

A difference is called clear of zero where its interval excludes 0 and its adjusted p, which stands beside it, is below
1 − confidence. Any other comes with the size that its interval excludes.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from lnjac.comparing import intervals as stats
from lnjac.comparing.compare import EXACT, Differences
from lnjac.comparing.cost import Costs
from lnjac.comparing.floor import FROZEN, Floor
from lnjac.comparing.intervals import Inference
from lnjac.comparing.scaling import Scaling
from lnjac.comparing.tables import Choices
from lnjac.norms.formulas import BACKWARDS
from lnjac.reporting.wording import (
    ALONE,
    CLEAR,
    UNADJUSTED,
    UNCLEAR,
    Numbers,
    Row,
    adjusted,
    capital,
    counted,
    decimals,
    diverged,
    joined,
    level,
    number,
    percent,
    place,
    records,
    seeds,
    short_unit,
    standing,
)
from lnjac.text import listed, word

LEAD = "center_scale"
"""The surrogate whose cost is told first: it leaves out the radial part alone, which is the question of lnjac."""
MOST_TOLD = 2
"""Rows that are told one by one; of more, the range and the largest."""
MOST_PARTS = 4
"""Methods that are told one by one against the floor; of more, the counts."""

METRICS = {"val_loss_nats": "validation loss", "train_loss_nats": "training loss"}
PARTS = {"center": "the centring", "radial": "the radial part", "scale": "the scaling by 1/σ"}

BETTER, NOT_SHOWN, WORSE = "better", "not shown to be better", "worse"
OUTCOMES = {
    BETTER: ("beats {}", "beat {}"),
    NOT_SHOWN: ("is not shown to beat {}", "are not shown to beat {}"),
    WORSE: ("is worse than {}", "are worse than {}"),
}
"""How a level can stand to the floor, and the verb for one and for several."""


# Claims of many rows


def _many(subject: str, rows: Sequence[Row], how: Inference, unit: str, name: Callable[[Row], str]) -> str:
    """Say the range of differences, how many are clear of zero, and the largest of those; or the size that all exclude."""
    known = [(standing(row, how), row) for row in rows if row["n"]]
    numbers = Numbers([row for _, row in known], how, unit)
    estimates = [row["difference"] for _, row in known]
    text = f"{subject} {numbers.ends(min(estimates), max(estimates))}{numbers.unit}"
    clear = [row for state, row in known if state == CLEAR]
    bounded = [row for state, row in known if state != ALONE]
    counts = {of: sum(state == of for state, _ in known) for of in (stats.IDENTICAL, stats.SAME, ALONE)}
    if counts[stats.IDENTICAL] == len(known) == len(rows):
        return f"{subject} 0{numbers.unit}: identical in {seeds([row for _, row in known])}."
    if clear:
        largest = max(clear, key=lambda row: abs(row["difference"]))
        own = Numbers([largest], how)
        below = f"adjusted p below {1 - how.confidence:.2g}"
        text += f", clear of zero in {len(clear)} of {len(known)} ({below}), the largest of those{name(largest)}"
        text += f": {own.signed(largest['difference'])} ({own.inside(largest)}, {adjusted(largest)})"
    elif bounded:
        low, high = min(row["low"] for row in bounded), max(row["high"] for row in bounded)
        tested = [row for row in bounded if not math.isnan(row["p_adjusted"])]
        smallest = f" (smallest {adjusted(min(tested, key=lambda row: row['p_adjusted']))})" if tested else ""
        after = " after Holm's adjustment" * any(state == UNADJUSTED for state, _ in known)
        others = " of the others" * (counts[stats.SAME] > 0)
        within = f"{percent(how)} intervals within {numbers.ends(low, high)}{numbers.also(bounded)}"
        text += f" ({within}); none{others} is clear of zero{after}"
        text += f"{smallest}, and each interval excludes differences larger than {numbers.above(max(-low, high))}"
    said = {
        stats.IDENTICAL: "identical",
        stats.SAME: "the same in every seed",
        ALONE: "of one seed, so without an interval",
    }
    text += "".join(
        f"; {n} of {len(known)} {'is' if n == 1 else 'are'} {said[state]}" for state, n in counts.items() if n
    )
    lost = len(rows) - len(known)
    return text + f"; {lost} more {'has' if lost == 1 else 'have'} no seed left" * bool(lost) + "."


def _pairs(subject: str, found: Differences, rows: Sequence[Row], cells: Sequence[str]) -> str:
    """Return the sentence on many differences between levels: `The 6 differences softmax − sigmoid …`."""
    pairs = {f"{word(row['a'])} − {word(row['b'])}" for row in rows}
    own = ["ln_backward"] * ("ln_backward" in rows[0] and len({row["ln_backward"] for row in rows}) > 1)

    def name(row: Row) -> str:
        pair = [f"{word(row['a'])} − {word(row['b'])}"] * (len(pairs) > 1)
        return _named(" ".join([*(word(row[name]) for name in own), *pair]), row, cells)

    which = f"{next(iter(pairs))} " if len(pairs) == 1 else f"between levels of {found.by} "
    return _many(f"The {len(rows)} differences {which}{subject} are", rows, found.how, _unit(found), name)


def _named(what: str, row: Row, cells: Sequence[str]) -> str:
    """Return ` for WHAT under softmax`: the words that name a row after the words `the largest`."""
    return "".join(f" {part}" for part in (f"for {what}" if what else "", place(row, cells)) if part)


def _unit(found: Differences) -> str:
    return next(iter(found.units.values()))


# Claims of one row


def _judged(row: Row, numbers: Numbers) -> str:
    """Return a difference and its standing: `+0.059 nats (95 % −0.039 to +0.158, 6 paired seeds), is not clear of zero …`."""
    state, size = standing(row, numbers.how), numbers.signed(row["difference"]) + numbers.unit
    if state == stats.IDENTICAL:
        return f"0{numbers.unit}, is identical in all {seeds([row])}"
    if state == stats.SAME:
        return f"{size}, is the same in each of {seeds([row])}"
    if state == ALONE:
        return f"{size}, is of one seed and has no interval"
    text = f"{size} ({numbers.inside(row)}), is "
    if state == CLEAR:
        return f"{text}clear of zero ({adjusted(row)})"
    if state == UNADJUSTED:
        return f"{text}clear of zero by its own interval but not among all that are compared ({adjusted(row)})"
    bound = numbers.above(max(-row["low"], row["high"]))
    return f"{text}not clear of zero, and none larger than {bound} is compatible with these seeds"


def _doubts(found: Differences, rows: Sequence[Row]) -> list[str]:
    """Return sentences on runs that diverged, seeds that are left out, and columns that move with the compared one."""
    said = diverged(found.diverged, found.runs)
    if missing := max((int(row["missing"]) for row in rows), default=0):
        said.append(f"{counted(missing, 'seed')} at only one of two levels {'is' if missing == 1 else 'are'} left out.")
    return said + _moving(rows, found.by)


def _moving(rows: Sequence[Row], by: str) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["moving"].split(", ") if name))
    if not names:
        return []
    moved = sum(bool(row["moving"]) for row in rows)
    change = "changes" if len(names) == 1 else "change"
    where = "" if moved == len(rows) else f" in {moved} of {len(rows)} comparisons"
    return [f"{joined(names)} {change} together with {by}{where}, so their effects cannot be told apart."]


# Enough seeds, and margins


def _enough(found: Differences, rows: Sequence[Row]) -> list[str]:
    """Judge differences of one metric against the margin, if there is one; of a single one say how many seeds it needs.

    An interval is wanted that reaches the margin, or half of a difference that is not clear of zero, to either side.
    """
    said = _against_margin(found, rows)
    if len(rows) != 1 or standing(rows[0], found.how) not in (CLEAR, UNADJUSTED, UNCLEAR):
        return said
    (row,) = rows
    reach = found.margin or abs(row["difference"]) / 2
    if (standing(row, found.how) == CLEAR and not found.margin) or (row["high"] - row["low"]) / 2 <= reach:
        return said
    needed = seeds_needed(found, row, reach)
    size = f"±{number(reach, decimals(reach, 2))} {short_unit(found.units[row['metric']])}".rstrip()
    what = "the margin" if found.margin else "half the difference"
    fewest = f"about {counted(needed, 'seed')}" if needed else f"more than {counted(stats.MOST_SEEDS, 'seed')}"
    return [*said, f"An interval of {size}, {what}, needs {fewest} if others spread as these do."]


def seeds_needed(found: Differences, row: Row, reach: float) -> int | None:
    """Return the fewest seeds of each level whose interval is expected to reach this far; None if too many."""
    of_seed = found.seeds.loc[[row["row"]]]
    if row["paired"]:
        return stats.seeds_for(reach, float(of_seed["difference"].std()), found.how) if reach else None
    a, b = float(of_seed["value_a"].var()), float(of_seed["value_b"].var())
    rate = (a + b) ** 2 / (a**2 + b**2)
    return stats.seeds_for(reach, math.sqrt(a + b), found.how, df_per_seed=rate) if reach else None


def _against_margin(found: Differences, rows: Sequence[Row]) -> list[str]:
    if found.margin is None or not rows:
        return []
    unit = short_unit(found.units[rows[0]["metric"]])
    against = f"Against a margin of {found.margin:g}{f' {unit}' if unit else ''}"
    how = f"two one-sided tests, {percent(found.how.one_sided)} interval"
    kinds = [row["equivalence"] for row in rows]
    if len(kinds) == 1:
        (kind,) = kinds
        whose = "the difference is" if kind == stats.UNDECIDED else "the levels are"
        return [f"{against} {whose} {kind} ({how})."]
    counts = [f"{kinds.count(kind)} {kind}" for kind in (stats.EQUIVALENT, stats.DIFFERENT, stats.UNDECIDED)]
    counts[0] = counts[0].replace(" ", f" of {len(kinds)} differences are ")
    return [f"{against}, {joined(counts)} ({how}, not adjusted)."]


# The floor


def of_floor(found: Floor | None, *, costs: bool = False) -> list[str]:
    """Say whether the reference level beats the floor: better, not shown to be better (with the interval), or worse.

    Args:
        found: The comparison with the floor; without one there is nothing to say.
        costs: Whether costs are told next, of which the sentence then says how to read them.

    Returns:
        A sentence, and another if columns move with the method.
    """
    rows = [row for row in records(found.rows) if row["n"]] if found is not None else []
    if found is None or not rows:
        return []
    groups = _grouped(rows, found.how)
    outcomes = {stands for _, stands in groups}
    levels = {number(row["mean_b"], 3) for row in rows}
    bigram = f"the bigram model{f' ({min(levels)} nats)' if len(levels) == 1 else ''}"
    name = "a frozen body" if found.kind == FROZEN else bigram
    parts: list[str] = []
    last, numbers = "", None
    for (method, stands), own in groups.items():
        again = method == last != ""
        if not again or numbers is None:
            together = own if not method else [row for (of, _), one in groups.items() if of == method for row in one]
            numbers = Numbers(together, found.how, "nats", after=numbers)
        verb = OUTCOMES[stands][not method].format("it" if parts else name)
        verb = verb.removesuffix(" than it") if parts else verb
        subject = "" if again else f"{method} " if method else f"{len(own)} of {len(rows)} cells "
        cells = [cell for cell in found.cells if cell != "method" or not method]
        parts.append(f"{subject}{verb}{_floored(own, stands, cells, numbers)}")
        last = method
    start = "With the exact backward" if found.exact else "By validation loss"
    judged = all(standing(row, found.how) != ALONE for row in rows)
    text = f"{start} {joined(parts)}{_consequence(found, outcomes, costs) if judged else ''}."
    return [text, *_moving(rows, "method")]


def _grouped(rows: Sequence[Row], how: Inference) -> dict[tuple[str, str], list[Row]]:
    """Return rows by method and outcome, those of a method together; by outcome alone, under an empty name, if too many."""
    groups: dict[tuple[str, str], list[Row]] = {}
    methods = list(dict.fromkeys(_method(row) for row in rows))
    for row in sorted(rows, key=lambda row: methods.index(_method(row))):
        groups.setdefault((_method(row), outcome(row, how)), []).append(row)
    if len(groups) <= MOST_PARTS:
        return groups
    merged = {("", stands): [row for row in rows if outcome(row, how) == stands] for stands in OUTCOMES}
    return {key: own for key, own in merged.items() if own}


def _method(row: Row) -> str:
    return word(row["method"]) if "method" in row else "the model"


def outcome(row: Row, how: Inference) -> str:
    """Return one of OUTCOMES: better and worse need an interval on one side of 0, with an adjusted p below 1 − confidence."""
    if standing(row, how) not in (CLEAR, stats.SAME) or row["difference"] == 0:
        return NOT_SHOWN
    return BETTER if row["difference"] < 0 else WORSE


def _floored(rows: Sequence[Row], stands: str, cells: Sequence[str], numbers: Numbers) -> str:
    """Return by how much, and where, rows of one outcome differ from the floor; those that beat it are below it."""
    sign = -1 if stands == BETTER else 1
    if len(rows) > MOST_TOLD:
        ends = sorted(sign * row["difference"] for row in rows)
        text = f" in {len(rows)} cells" * ("method" not in cells) + f" ({numbers.ends(ends[0], ends[-1])}{numbers.unit}"
        if bounds := [sign * row[end] for row in rows for end in ("low", "high") if not math.isnan(row[end])]:
            text += f", {percent(numbers.how)} intervals within {numbers.ends(min(bounds), max(bounds))}"
        return f"{text}{numbers.also(rows)})"
    parts = []
    for row in rows:
        state, size = standing(row, numbers.how), numbers.plain(abs(row["difference"])) + numbers.unit
        inside = f"by {size}, {numbers.inside(row, flipped=stands == BETTER)}" if stands != NOT_SHOWN else ""
        if state == stats.IDENTICAL:
            inside = f"identical in all {seeds([row])}"
        elif state == stats.SAME:
            inside = f"by {size}, the same in each of {seeds([row])}"
        elif state == ALONE:
            inside = f"{numbers.signed(row['difference'])}{numbers.unit}, one seed, so no interval"
        elif stands == NOT_SHOWN:
            inside = f"{numbers.interval(row['low'], row['high'])}{numbers.unit}{numbers.also([row])}"
            inside += f", {adjusted(row)}" * (state == UNADJUSTED)
        parts.append(" ".join(filter(None, [place(row, cells), f"({inside})"])))
    return " " + joined(parts)


def _consequence(found: Floor, outcomes: Collection[str], costs: bool) -> str:
    """Return what the floor means for the body, and for the costs that are told next."""
    if BETTER in outcomes:
        others = costs and found.kind == FROZEN and len(set(outcomes)) > 1
        return ": where it is not beaten, a cost is harm done, not learning lost" * others
    shown = " that these seeds show" * (NOT_SHOWN in outcomes)
    if found.kind == FROZEN:
        return (
            f": training the body has earned nothing yet{shown}"
            + ", so a cost here is harm done, not learning lost" * costs
        )
    return ": the loss is no evidence of learning more than pairs of tokens"


# Costs


def of_costs(found: Costs) -> list[str]:
    """Say what leaving out a part of the backward costs, and whether that differs between the levels of `found.by`.

    The surrogate LEAD is told first if it is there, else the one with the largest cost; then all together.
    """
    costs, apart = found.costs, found.differences
    every, cells, method = _trained(costs)
    pairs, pair_cells, _ = _trained(apart) if apart is not None else ([], [], "")
    known = [row for row in every if row["n"]]
    if not known:
        return ["No backward can be compared with the exact one in any seed.", *_doubts(costs, every)]
    names = list(dict.fromkeys(word(row["a"]) for row in known))
    lead = LEAD if LEAD in names else word(max(known, key=lambda row: abs(row["difference"]))["a"])
    own, own_pairs = (
        [row for row in every if word(row["a"]) == lead],
        [row for row in pairs if word(row["ln_backward"]) == lead],
    )
    told = [row for row in own_pairs if row["n"]]
    said = [
        f"{method}{_lead(costs, lead, own, cells, told)}" if method else capital(_lead(costs, lead, own, cells, told))
    ]
    if apart is not None and len(told) > 1:
        said.append(_pairs("of this cost", apart, own_pairs, pair_cells))
    said += _enough(apart, told) if apart is not None and len(told) == 1 else _enough(costs, own)
    if len(names) > 1:
        subject = f"The {len(every)} costs of {len(names)} backwards are"
        said.append(_many(subject, every, costs.how, _unit(costs), lambda row: _named(word(row["a"]), row, cells)))
        if apart is not None and len(pairs) > len(own_pairs) and any(row["n"] for row in pairs):
            said.append(_pairs("of these costs", apart, pairs, pair_cells))
        said += (
            _against_margin(apart if apart is not None else costs, pairs or every) if len(pairs or every) > 1 else []
        )
    doubts = of_tuning(costs.choices) + _doubts(costs, every)
    return said + doubts + [line for line in (_doubts(apart, pairs) if apart is not None else []) if line not in doubts]


def _trained(found: Differences) -> tuple[list[Row], list[str], str]:
    """Return the rows of bodies that learn, the cells that tell them apart, and `With fa, ` if that is no more told.

    A table of nothing but the control keeps its rows.
    """
    rows = records(found.rows)
    trained = [row for row in rows if row.get("method") != FROZEN]
    if len(trained) in (0, len(rows)):
        return rows, found.cells, ""
    methods = {word(row["method"]) for row in trained}
    if len(methods) > 1:
        return trained, found.cells, ""
    return trained, [name for name in found.cells if name != "method"], f"With {methods.pop()}, "


def left_out(label: str) -> str:
    """Return a surrogate in words: `leaving the radial part out at ln_f (center_scale@ln_f)`."""
    name, _, sites = label.partition("@")
    if name not in BACKWARDS or name == EXACT:
        return f"using the backward {label}"
    exact, own = BACKWARDS[EXACT]._asdict(), BACKWARDS[name]._asdict()
    parts = [words for part, words in PARTS.items() if own[part] != exact[part]]
    which = "all three parts" if len(parts) == len(PARTS) else joined(parts)
    where = f" at {joined(sites.split('+'))}" if sites else ""
    return f"leaving {which} out{where} ({label})"


def _lead(costs: Differences, lead: str, rows: Sequence[Row], cells: Sequence[str], pairs: Sequence[Row]) -> str:
    """Return the sentence on one surrogate's costs, and on their difference if there is just one."""
    known = [row for row in rows if row["n"]]
    if len(known) > MOST_TOLD:
        name = f"the {len(rows)} costs of {left_out(lead)} are"
        return _many(name, rows, costs.how, _unit(costs), lambda row: _named("", row, cells))
    numbers = Numbers([*known, *pairs], costs.how, _unit(costs))
    parts, verb = [], ""
    for row in known:
        said, before = _paid(row, numbers, cells), verb
        verb = said.split(" ")[0]
        parts.append(said.removeprefix(f"{verb} ") if verb == before and verb in ("costs", "saves") else said)
    text = f"{left_out(lead)} {joined(parts) or 'has no seed left to compare'}"
    if len(pairs) == 1:
        (row,) = pairs
        text += f"; the difference {word(row['a'])} − {word(row['b'])}, {_judged(row, numbers)}"
    return text + "."


def _paid(row: Row, numbers: Numbers, cells: Sequence[str]) -> str:
    """Return one cell's cost: `costs 0.539 nats under softmax (95 % 0.476 to 0.602, 6 paired seeds)`."""
    state, size = standing(row, numbers.how), numbers.plain(abs(row["difference"])) + numbers.unit
    where, saves = f" {place(row, cells)}".rstrip(), row["difference"] < 0
    costs = f"{'saves' if saves else 'costs'} {size}{where}"
    if state == stats.IDENTICAL:
        return f"costs nothing{where} (identical in all {seeds([row])})"
    if state == stats.SAME:
        return f"{costs} (the same in each of {seeds([row])})"
    if state == ALONE:
        return f"{costs} (one seed, so no interval)"
    if state == UNCLEAR:
        inside = f"{numbers.signed(row['difference'])}{numbers.unit}, {numbers.inside(row)}"
        return f"is not shown to cost or save anything{where} ({inside})"
    only = f", by its own interval only: {adjusted(row)}" * (state == UNADJUSTED)
    return f"{costs} ({numbers.inside(row, flipped=saves)}{only})"


# Differences between levels


def of_tuning(found: Choices | None) -> list[str]:
    """Say which values were chosen before levels were compared, one by one if they are few, else how many."""
    if found is None:
        return []
    rows = records(found.rows)
    named = [f"{key}=" * (len(found.keys) > 1) for key in found.keys]
    values = [joined([f"{name}{word(row[key])}" for name, key in zip(named, found.keys, strict=True)]) for row in rows]
    told = [f"{value} {place(row, found.levels)}".rstrip() for value, row in zip(values, rows, strict=True)]
    which = joined(told) if len(told) <= MOST_PARTS else f"{len({*values})} values at {len(rows)} levels"
    by = counted(len(found.tuning), "other seed")
    text = f"Compared at each level's best {joined(found.keys)}, chosen on {by}: {which}"
    n = sum(map(bool, found.rows["edge"]))
    edge = f"; {n} of these {'is' if n == 1 else 'are'} at the edge of the values that were run" if n else ""
    return [f"{text}{edge}."]


def of_differences(found: Differences) -> list[str]:
    """Say how levels differ in each metric, row by row if there are one or two, else the range and the largest."""
    said: list[str] = []
    rows = records(found.rows)
    for metric in found.units:
        own, name = [row for row in rows if row["metric"] == metric], METRICS.get(metric, metric)
        known = [row for row in own if row["n"]]
        one = replace(found, units={metric: found.units[metric]})
        if not known:
            said.append(f"No two levels of {found.by} can be compared in {name}{_lost(own, found.by)}.")
            continue
        said += (
            [_pair(row, name, one) for row in known]
            if len(own) <= MOST_TOLD
            else [_pairs(f"in {name}", one, own, found.cells)]
        )
        said += _enough(one, known)
    return said + of_tuning(found.choices) + _doubts(found, rows)


def _lost(rows: Sequence[Row], by: str) -> str:
    """Return how many runs diverged at each level that has no other."""
    gone = {
        level(by, row[side]): f"{row[f'diverged_{side}']} of {counted(row[f'runs_{side}'], 'run')} diverged"
        for row in rows
        for side in "ab"
        if row[f"diverged_{side}"] == row[f"runs_{side}"] > 0
    }
    return f": {listed([f'{said} {where}' for where, said in gone.items()], 3)}" if gone else ""


def _pair(row: Row, name: str, found: Differences) -> str:
    """Return the sentence on one difference between two levels."""
    numbers, state = Numbers([row], found.how, _unit(found)), standing(row, found.how)
    subject = f"The {name} {place(row, found.cells)}".rstrip()
    a, b = (level(found.by, row[side]) for side in "ab")
    if state == stats.IDENTICAL:
        return f"{subject} is identical {a} and {b} in all {seeds([row])}."
    if state == UNCLEAR:
        of = "" if found.by in ("attn_mode", "method", "ln_backward") else f"{found.by}="
        one, other = (word(row[side]) for side in "ab")
        both = f"between {of}{one} and {of}{other}"
        return f"{subject} is not shown to differ {both}: {one} − {other}, {_judged(row, numbers)}."
    lower = row["difference"] < 0
    text = f"{subject} is {numbers.plain(abs(row['difference']))}{numbers.unit} {'lower' if lower else 'higher'} {a} than {b}"
    if state == stats.SAME:
        return f"{text}, the same in each of {seeds([row])}."
    if state == ALONE:
        return f"{text} in one seed, which has no interval."
    text += f" ({numbers.inside(row, flipped=lower)}"
    if state == UNADJUSTED:
        return f"{text}): clear of zero by its own interval but not among all that are compared ({adjusted(row)})."
    return f"{text}, {adjusted(row)})."


# Scaling


def of_scaling(found: Scaling) -> list[str]:
    """Say the slope of log metric against log x, with its interval over seeds, and whether a line describes the points."""
    said: list[str] = []
    rows = [row | {"difference": row["slope"]} for row in records(found.slopes)]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        own, name = [row for row in rows if row["metric"] == metric], METRICS.get(metric, metric)
        if len(own) <= MOST_TOLD:
            said += [_slope(row, name, found) for row in own]
            continue
        numbers, slopes = Numbers(own, found.how), [row["slope"] for row in own]
        away, bent = (
            sum(map(bool, of)) for of in ([r["low"] > 0 or r["high"] < 0 for r in own], [r["bends"] for r in own])
        )
        said.append(
            f"The {len(own)} slopes of log {name} against log {found.x} are {numbers.ends(min(slopes), max(slopes))}"
            f"{numbers.also(own)}; the {percent(found.how)} interval excludes 0 in {away}"
            + f", and a straight line does not describe {bent}" * bool(bent)
            + "."
        )
    return (said or [f"No slope along {found.x} can be fitted."]) + diverged(found.diverged, found.runs)


def _slope(row: Row, name: str, found: Scaling) -> str:
    numbers = Numbers([row], found.how)
    subject, slope = f"The {name} {place(row, found.cells)}".rstrip(), numbers.signed(row["slope"])
    if math.isnan(row["low"]):
        text = f"{subject} goes as {found.x} to the power {slope} in one seed, which has no interval"
    elif row["low"] <= 0 <= row["high"]:
        bound = numbers.above(max(-row["low"], row["high"]))
        text = (
            f"{subject} is not shown to change with {found.x}: to the power {slope} ({numbers.inside(row)}), and none "
        )
        text += f"beyond ±{bound} is compatible with these seeds"
    else:
        falls = "falls" if row["slope"] < 0 else "rises"
        text = f"{subject} {falls} as {found.x} to the power {slope} ({numbers.inside(row)})"
    if row["bends"]:
        return f"{text}; a straight line does not describe the points, so read them and not the slope."
    return text + "; two points cannot show whether a line describes it" * math.isnan(row["r2"]) + "."
