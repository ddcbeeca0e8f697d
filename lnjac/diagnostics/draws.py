"""Measure each norm's enrichments over other draws of the feedback, before the first update; 1 is expected by chance."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lnjac.diagnostics.attention import MECHANISM
from lnjac.diagnostics.base import Diagnostic, Rows, Subject
from lnjac.gpt import model as gpt
from lnjac.norms.capture import Loss
from lnjac.norms.formulas import GradAt
from lnjac.norms.probe import probe
from lnjac.seeding import sequence

OVER_DRAWS = ("enrichment_mean", "enrichment_radial", "enrichment_radial_share")
"""Columns of a layer row that are averaged over draws of the feedback."""

QUANTITIES = {
    f"{column}_over_draws{suffix}": f"{what} over draws of the feedback of {column} (layers), at step 0"
    for column in OVER_DRAWS
    for suffix, what in (("", "mean"), ("_stderr", "standard error of the mean"))
}


@dataclass
class FeedbackDraws(Diagnostic):
    """Measure enrichments over draws of the feedback, from seeds apart from the run's own streams."""

    table = "mechanism"
    columns = MECHANISM
    quantities = QUANTITIES
    cost = "a measurement of the norms for each draw, once"
    needs_optimizer = False

    draws: int

    def before(self, subject: Subject) -> Rows:
        config = subject.config
        seeds = (
            int(sequence(config.seed, "feedback draws", i).generate_state(1, np.uint64)[0]) for i in range(self.draws)
        )
        draws = (gpt.feedback(replace(config, seed=seed), subject.vocab_size) for seed in seeds)
        grad_at = config.diagnostics.grad_at
        return over_draws(subject.model, draws, subject.diagnostic_batches(), subject.loss, grad_at=grad_at)


def over_draws(
    model: nn.Module,
    draws: Iterable[Mapping[str, Tensor]],
    batches: Sequence[Any],
    loss: Loss,
    *,
    grad_at: GradAt | str = GradAt.normalized,
) -> Rows:
    """Return the mean and standard error of each norm's enrichments over draws of the feedback, given by name.

    No rows where the draws leave the model's feedback as it is: where it has none, or no random one.
    """
    state = model.state_dict()
    values: dict[tuple[str, int, str], list[float]] = {}
    for draw in draws:
        if all(torch.equal(state[name], value.to(state[name])) for name, value in draw.items()):
            continue
        with gpt.replaced(model, draw):
            for row in probe(model, grad_at=grad_at).measure(batches, loss).to_dict("records"):
                for column in OVER_DRAWS:
                    values.setdefault((row["site"], row["call"], column), []).append(row[column])
    found = []
    for (site, call, column), over in values.items():
        error = float(np.std(over, ddof=1)) / math.sqrt(len(over)) if len(over) > 1 else math.nan
        for suffix, value in (("", float(np.mean(over))), ("_stderr", error)):
            quantity = f"{column}_over_draws{suffix}"
            found.append({"place": site, "call": call, "quantity": quantity, "value": value, "n": len(over)})
    return found
