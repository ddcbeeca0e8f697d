"""The interface of a diagnostic, and the pass over the diagnostic batches that all diagnostics share."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lnjac.columns import Column
from lnjac.gpt.model import GPT
from lnjac.norms.probe import Pass, fresh_grads, probe

if TYPE_CHECKING:
    import pandas as pd

Rows = list[dict[str, Any]]


class Subject(Protocol):
    """The run that is measured, as it stands: lnjac.training.loop.Training."""

    config: Any
    model: GPT
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    updates: int
    vocab_size: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]: ...

    def mean_loss(self, batches: Iterable[Any]) -> tuple[float, int]: ...

    def diagnostic_batches(self) -> list[tuple[Tensor, Tensor]]: ...


class Diagnostic:
    """A measurement on a run that fills one table. A subclass takes part in the moments whose methods it defines.

    It is a dataclass of settings, as its yaml file has them. Each measurement is made by a copy of its own, so what it
    gathers in `begin`, `watch` and `passed` is its own too. It leaves the model as it was found.
    """

    table: ClassVar[str]
    columns: ClassVar[Sequence[Column]]
    """The columns of `rows`; run_id, diag_id and step come before them in the table."""
    quantities: ClassVar[Mapping[str, str]] = {}
    """The values of its column `quantity`, if it has one, and their meanings."""
    cost: ClassVar[str]
    """The time that a measurement takes, in words."""
    needs_tokens: ClassVar[bool] = False
    """Whether `passed` needs each token's numbers, beside the sums at each call of a norm."""
    needs_optimizer: ClassVar[bool] = True
    """Whether it reads the optimizer's state, which finished runs keep only with keep_state=true."""

    def before(self, subject: Subject) -> Rows:
        """Measure once, before the first update, whatever the schedule; return the rows."""
        return []

    def begin(self, subject: Subject) -> None:
        """Begin a measurement of the model as it stands, in eval mode."""
        self.subject = subject

    def watch(self) -> AbstractContextManager[Any]:
        """Return a context around the shared forward and backward pass on one batch."""
        return nullcontext()

    def passed(self, batch: Any, seen: Pass) -> None:
        """Read parameters' `.grad` of the mean loss after a pass, and the sums of each norm call in `seen`."""

    def rows(self) -> Rows:
        """Return the rows of this measurement; further passes may be made here."""
        return []


def before(diagnostics: Sequence[Diagnostic], subject: Subject) -> dict[str, Rows]:
    """Make the measurements before the first update; return their rows by table."""
    subject.model.eval()
    found: dict[str, Rows] = {}
    for diagnostic in diagnostics:
        if rows := copy.copy(diagnostic).before(subject):
            found.setdefault(diagnostic.table, []).extend(rows)
    return found


def measure(diagnostics: Sequence[Diagnostic], subject: Subject) -> "dict[str, pd.DataFrame | Rows]":
    """Measure the norms and every diagnostic, with dropout off; return the rows of each table.

    Each diagnostic batch is passed forward and backward once, whoever watches.
    """
    model, step = subject.model, subject.updates
    model.eval()
    running = [copy.copy(diagnostic) for diagnostic in diagnostics]
    norms = probe(
        model,
        grad_at=subject.config.diagnostics.grad_at,
        keep_tokens=any(diagnostic.needs_tokens for diagnostic in running),
    )
    for diagnostic in running:
        diagnostic.begin(subject)
    batches = subject.diagnostic_batches()
    for batch in batches:
        with fresh_grads(model):
            with ExitStack() as watching:
                seen = watching.enter_context(norms.watch(step, scale=len(batches)))  # no part of one mean
                for diagnostic in running:
                    watching.enter_context(diagnostic.watch())
                mean, tokens = subject.loss(model, batch)
                seen.tokens(tokens, mean)
                mean.backward()  # type: ignore[no-untyped-call]
            for diagnostic in running:
                diagnostic.passed(batch, seen)
        del mean  # and with its graph the tensors that hooks on it hold
    layers, found = norms.rows(step), dict[str, Rows]()
    for diagnostic in running:
        if rows := diagnostic.rows():
            found.setdefault(diagnostic.table, []).extend(rows)
    return {"layers": layers, **found}
