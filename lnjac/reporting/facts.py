"""Tell what was run: the line under a report's answer, what makes the answer doubtful, and the details."""

import re
from typing import Any

import pandas as pd

from lnjac.comparing.compare import RUN_METRICS
from lnjac.comparing.experiment import IDENTITY, varying
from lnjac.comparing.notes import FEW
from lnjac.reporting.view import View
from lnjac.reporting.wording import counted
from lnjac.runs.folder import DIVERGED, DONE
from lnjac.text import listed, word

CONFIG = (
    *("model", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size"),
    *("attn_mode", "method", "ln_backward", "optimizer", "optimizer.lr"),
    *("data", "batch_size", "steps", "precision", "unigram_nats", "bigram_nats"),
)
"""Columns of runs that the details list even if they are the same in all of them."""
PROVENANCE = ("commit", "lnjac_version", "torch_version", "python_version", "device", "data_sha256")

REMEDIES = {
    r"^mixed commits": "run all of them again from one commit, or choose one by --where \"commit == '…'\"",
    r"^mixed numerics versions": "choose one by --where \"numerics_version == '…'\"",
    r"uncommitted changes$": "commit the changes and run these again",
    r"is not one corpus": "choose one by --where \"data_sha256 == '…'\"",
    r"^mixed schema": "run the sources that lack them again, or leave these columns out",
    r"were found and not merged": "their reasons are below; the same sweep again finishes what failed",
    r"is missing": "merge the runs again",
}
"""For the warnings of a merge (lnjac.runs.merge): what a reader can do."""


SENTENCE = re.compile(r"[a-z]+ (?!holds no run folders)")
"""How a doubt begins that may be given a capital: with a word, and not with a path."""


class Facts:
    """The runs of a view in words."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.runs = view.runs.drop(columns=["cell", "level"])
        self.merge = view.merged.report
        vary = varying(self.runs, view.merged.described("runs"))
        groups = [name for name in vary if "." not in name and name not in IDENTITY]
        own = [name for name in vary if "." in name and name.partition(".")[0] not in groups]  # else told by the member
        self.vary = [*groups, *own, "seed"]

    def line(self) -> list[tuple[str, str]]:
        """Return the parts of one line on the runs, each with the place of its details."""
        seeds = self.runs["seed"].nunique()
        parts = [(counted(len(self.runs), "run"), "#varies"), (counted(seeds, "seed"), "#varies")]
        if "steps" in self.runs:
            parts.append((f"{_values(self.runs['steps'], 3)} steps", "#varies"))
        if "data" in self.runs and self.runs["data"].notna().any():
            parts.append((_values(self.runs["data"], 3), "#provenance"))
        if self.view.where:
            parts.append((f"where {self.view.where}", "#varies"))
        lost = self._diverged()
        parts.append((f"{lost} diverged", "#diverged" if lost else "#varies"))
        skipped = len(self.merge.get("skipped", ()))
        return [*parts, (f"{skipped} skipped", "#skipped" if skipped else "#provenance")]

    def doubts(self) -> list[str]:
        """Return what makes the answer doubtful, each with what to do."""
        found = []
        for warning in self.view.merged.warnings:
            remedy = next((text for pattern, text in REMEDIES.items() if re.search(pattern, warning)), None)
            short = re.sub(r"\b([0-9a-f]{10})[0-9a-f]{20,}\b", r"\1", warning)
            found.append(f"{short}: {remedy}." if remedy else f"{short}.")
        arms = self.view.runs[self.view.runs["status"] == DONE].groupby(["cell", "level"])["seed"].nunique()
        if few := int((arms < FEW).sum()):
            which = "The runs have" if len(arms) == 1 else f"{few} of {len(arms)} configs have"
            found.append(f"{which} fewer than {FEW} seeds, so intervals say next to nothing: add seed=1,2,3,4,5,6.")
        if lost := self._diverged():
            of = counted(len(self.runs), "run")
            found.append(
                f"{lost} of {of} diverged and {'is' if lost == 1 else 'are'} in no mean, which flatters their levels: "
                "lower optimizer.lr and run them again."
            )
        return [text[0].upper() + text[1:] if SENTENCE.match(text) else text for text in found]

    def varies(self) -> list[tuple[str, str]]:
        """Return the columns in which runs differ, with their values."""
        return [(name, _values(self.runs[name])) for name in self.vary]

    def every(self) -> pd.DataFrame:
        """Return each run: what varies, its status and loss, and the id by which a command names it."""
        losses = [name for name in RUN_METRICS if name in self.runs and self.runs[name].notna().any()][:1]
        runs = self.runs[[*(name for name in self.vary if name in self.runs), "status", *losses]]
        runs = runs.assign(**{name: self.runs[name].map(word) for name in self.vary if name in self.runs})
        ids = self.runs["run_id"]
        if "diag_id" in self.runs:  # other diagnostics of one run are a row of their own
            ids = ids.where(~ids.duplicated(keep=False), ids + "/" + self.runs["diag_id"])
        return runs.assign(run_id=ids)

    def fixed(self) -> list[tuple[str, str]]:
        """Return the config that all runs have in common."""
        known = [name for name in CONFIG if name in self.runs and name not in self.vary]
        return [(name, _values(self.runs[name])) for name in known if self.runs[name].notna().any()]

    def provenance(self) -> list[tuple[str, str]]:
        """Return where the runs are from and what made them."""
        found = []
        if self.merge:
            counts = f"{self.merge['found']} found, {self.merge['merged']} merged, {len(self.merge['skipped'])} skipped"
            found += [("merge", counts), ("sources", listed(self.merge["sources"]))]
        known = {name: self.runs[name] for name in PROVENANCE if name in self.runs and self.runs[name].notna().any()}
        found += [
            (name, _values(column.astype(str).str[:12])) for name, column in known.items()
        ]  # hashes by their beginning
        if "dirty" in self.runs and self.runs["dirty"].notna().any():
            found.append(("working tree", _values(self.runs["dirty"].map({False: "clean", True: "dirty"}))))
        if "started_at" in self.runs and self.runs["started_at"].notna().any():
            found.append(("started", f"{self.runs['started_at'].min()} to {self.runs['started_at'].max()}"))
        if "wall_s" in self.runs and self.runs["wall_s"].notna().any():
            found.append(("computing", f"{self.runs['wall_s'].sum() / 3600:.2f} hours"))
        return found

    def _diverged(self) -> int:
        return int((self.runs["status"] == DIVERGED).sum())


def _values(column: "pd.Series[Any]", most: int = 12) -> str:
    """Return its different values, null first, numbers in their order."""
    known = column.dropna().unique().tolist()
    values = [None] * column.hasnans + (sorted(known) if column.dtype.kind in "if" else known)
    return listed([word(value) for value in values], most)
