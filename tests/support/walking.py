"""Compare what a probe measures of a model with the oracle's truth about every call of every module in it."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch
from support import oracle
from torch import Tensor, nn

import lnjac

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]

RELATIVE = 1e-6
ABSOLUTE = 1e-9
"""Shares and cosines that vanish in exact arithmetic are compared by this."""

OTHER_KINDS = re.compile("batch_?norm|group_?norm|instance_?norm|response_?norm|weight_?norm", re.IGNORECASE)

HEADINGS = ["architecture", "dtype", "norms measured", "without gradient", "refused", "missing", "wrong"]


@dataclass
class Walk:
    """What became of each call of each norm of one model. Keys and entries name the site and its class."""

    measured: Counter[str] = field(default_factory=Counter)
    """How many rows are the truth, by the norm's class; `functional` ones are those of no module."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why the probe refused a module that computes no norm of one affine part."""
    other: set[str] = field(default_factory=set)
    """Classes of norms of another kind."""
    no_gradient: list[str] = field(default_factory=list)
    refused_norms: dict[str, str] = field(default_factory=dict)
    """A fault: norms by the oracle that the probe refused, and why."""
    missing: list[str] = field(default_factory=list)
    """A fault: neither measured nor refused."""
    wrong: list[str] = field(default_factory=list)
    """A fault: rows with other numbers than the oracle's, or that the oracle knows nothing of."""

    @property
    def faults(self) -> list[str]:
        refused = [f"{site} is a norm and refused: {why}" for site, why in self.refused_norms.items()]
        return [*refused, *(f"{site} is silently missing" for site in self.missing), *self.wrong]

    def cells(self, name: str, dtype: torch.dtype) -> list[str]:
        """Return the model's row of the zoo's table, whose columns are HEADINGS."""
        measured = [f"{count} {cls}" for cls, count in self.measured.items()]
        measured += [f"(of another kind: {cls})" for cls in sorted(self.other)]
        reasons = Counter([*self.refused.values(), *self.refused_norms.values()])
        refused = [f"{count} {why}" for why, count in reasons.items()]
        columns = (measured, self.no_gradient, refused, self.missing, self.wrong)
        return [name, str(dtype).removeprefix("torch."), *(", ".join(column) or "–" for column in columns)]


def table(rows: list[list[str]]) -> str:
    """Return rows of the zoo's table as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def measure(model: nn.Module, batch: Any, loss: Loss) -> tuple[pd.DataFrame, dict[str, str], dict[str, str]]:
    """Return the probe's rows, the sites that it refuses with the reason, and the state of each site."""
    probe = lnjac.probe(model, unknown="skip")
    try:
        rows = probe.measure([batch], loss)
    except ValueError as error:
        if "no gradient arrived" not in str(error) and "has no LayerNorm" not in str(error):
            raise
        rows = pd.DataFrame(columns=["site", "call"])
    covered = probe.coverage().set_index("site")
    refused = covered[covered["state"] == "refused"]
    return rows, (refused["class"] + ": " + refused["reason"]).to_dict(), covered["state"].to_dict()


def walk(model: nn.Module, batch: Any, loss: Loss) -> Walk:
    """Run the model under the oracle and under the probe, and return what each norm's rows are worth."""
    with oracle.watch(model) as calls:
        mean, tokens = loss(model, batch)
    mean.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    rows, refused, states = measure(model, batch, loss)
    found = {(row["site"], row["call"]): row for row in rows.to_dict("records")}
    seen = Walk()
    around_norms: set[str] = set()
    functional = []
    for call in calls:  # inner ones end first
        if call.x.numel() == 0:
            continue
        cls = type(call.module).__name__
        name = f"{call.site} ({cls})"
        fit = None
        if call.grad is not None and call.site not in around_norms and not known_as_no_norm(call.module):
            fit = oracle.fit(call)
        if fit is not None:
            around_norms |= _around(call.site)
            row = found.pop((call.site, call.call), None)
            if row is None and states.get(call.site) == "functional call":  # conditional: its inner function has a row
                functional += [(call, one) for one in call.functional if one.grad is not None]
            elif row is None and call.site in refused:
                (seen.refused if fit.conditional else seen.refused_norms)[name] = refused[call.site]
            elif row is None:
                seen.missing.append(name)
            elif apart := differences(row, oracle.numbers(call, fit, tokens)):
                seen.wrong.append(f"{name}: {apart}")
            else:
                seen.measured[cls] += 1
        elif call.site in refused:
            seen.refused[name] = refused[call.site]
        else:
            functional += [(call, one) for one in call.functional if one.grad is not None]
            if call.inside or "norm" not in cls.lower() or call.functional:
                continue
            if OTHER_KINDS.search(cls):
                seen.other.add(cls)
            elif call.grad is None and call.returned == "Tensor":
                seen.no_gradient.append(name)
            else:
                seen.missing.append(name)
    for call, one in functional:
        true = oracle.numbers(one, one.fit, tokens)
        rows_there = [key for key in found if key[0].startswith(call.site) and not differences(found[key], true)]
        if rows_there:
            del found[rows_there[0]]
            seen.measured["functional"] += 1
        else:
            seen.missing.append(f"a functional norm in {call.site} ({type(call.module).__name__})")
    seen.wrong += [f"{site} call {number}: the oracle knows no such norm there" for site, number in found]
    return seen


def known_as_no_norm(module: nn.Module) -> bool:
    """Return whether a module is one of torch's own that is neither a LayerNorm nor an RMSNorm."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.LayerNorm, nn.RMSNorm)
    )


def _around(site: str) -> set[str]:
    """Return the names of the modules around this one; the model's own is empty."""
    words = site.split(".")
    return {".".join(words[:n]) for n in range(len(words))} if site else set()


def differences(row: dict[str, Any], truth: dict[str, Any]) -> str:
    """Return the columns in which a row is not the truth, with both values; empty where it is."""
    return ", ".join(
        f"{name} {row[name]} for {true}"
        for name, true in truth.items()
        if row[name]
        != (true if isinstance(true, str) else pytest.approx(true, rel=RELATIVE, abs=ABSOLUTE, nan_ok=True))
    )
