"""Tell how the jobs of a sweep begin, before any starts: measured again, continued, or trained from the start."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import Any, cast

from lnjac.config.compose import RunComposed
from lnjac.config.schema import RunConfig
from lnjac.diagnostics.settings import Schedule
from lnjac.errors import ConfigError
from lnjac.runs import folder as runs
from lnjac.sweeps.jobs import Job
from lnjac.sweeps.protocol import Start, Starts
from lnjac.training import kept
from lnjac.training import run as train


def searched(reuse: Any, auto: Path | None) -> Path | None:
    """Return the folder whose finished runs are looked at, by the setting `reuse`; None for none.

    Raises:
        ConfigError: There is no such folder.
    """
    if reuse in ("auto", "off", False, None):  # False is how yaml reads off
        return auto if reuse == "auto" else None
    if not Path(str(reuse)).is_dir():
        raise ConfigError(f"reuse={reuse} is no folder: give one that holds finished runs, or auto, or off")
    return Path(str(reuse))


def starts(jobs: Sequence[Job], root: Path | None, *, here: bool) -> Starts:
    """Return how each job begins, and what their user should know of it.

    Args:
        jobs: Those to be made.
        root: The folder whose finished runs they may begin from.
        here: Whether they run on this machine.
    """
    known = kept.finished(root) if root else kept.Known()
    problems, differing = Counter[str](), Counter[str]()
    found = []
    for job in jobs:
        start = _start(job, known)
        if start.problem:
            problems[start.problem] += 1
        if start.source is None:
            found.append(Start({"reuse": "off"}))
            continue
        folder, left = start.source.folder, start.left(job.plan.columns["steps"])
        found.append(Start({"reuse": str(folder.absolute())}, folder, start.step, left))
        if others := train.differing(folder, _config(job), here=here):
            differing["; ".join(others)] += 1
    notes = [f"{n} of these {_are(n)} trained from the start: {problem}" for problem, n in problems.items()]
    notes += [
        f"{n} of these {_are(n)} begun from runs made with {said}: digits may differ from those of runs made here"
        for said, n in differing.items()
    ]
    trained = [job for job, start in zip(jobs, found, strict=True) if start.source is None]
    return Starts(found, [*notes, *_prefixes(trained)])


def _config(job: Job) -> RunConfig:
    return cast(RunComposed, job.composed).build()


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _start(job: Job, known: kept.Known) -> kept.Start:
    if job.state.name == runs.INTERRUPTED and (job.folder / runs.CHECKPOINT).exists():
        return kept.Start(None)  # resumed
    if not known.related(job.plan.identity["run_id"], job.plan.columns["steps"]):
        return kept.Start(None)
    return kept.choose(_config(job), job.plan.data_sha256, known)


def _prefixes(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield a line if some of the runs to be trained are beginnings of others, and how to train the others alone."""
    alike: dict[frozenset[Any], dict[int, Job]] = defaultdict(dict)
    for job in jobs:
        rest = {name: value for name, value in job.plan.columns.items() if name != "steps"}
        alike[frozenset(rest.items())][job.plan.columns["steps"]] = job
    superfluous: Counter[tuple[int, ...]] = Counter()
    for by_steps in alike.values():
        *shorter, longest = sorted(by_steps)
        if not shorter or shorter[0] == 0:
            continue
        config = _config(by_steps[longest])
        if config.diagnostics.schedule is Schedule.final and all(kept.same_rates(config, steps) for steps in shorter):
            superfluous[(*shorter, longest)] += len(shorter)
    for (*shorter, longest), n in superfluous.items():
        at = ",".join(map(str, shorter))
        yield (
            f"{n} of these would train beginnings of others again: steps={longest} diagnostics.schedule=list "
            f"'diagnostics.steps=[{at}]' measures the norms at steps {at} of one run, and "
            f"eval.every={gcd(*shorter)} its validation losses"
        )
