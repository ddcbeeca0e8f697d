"""`lnjac-run`, and run.py too: train, analyse and write one run, or with -m a sweep of them."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lnjac.config.compose import RunComposed, RunComposer
    from lnjac.sweeps.jobs import Job
    from lnjac.sweeps.protocol import Planned, Starts

log = logging.getLogger("lnjac")

OUTPUTS = Path("outputs")
"""The folder of single runs."""

preload = ("lnjac.training.run", "pandas", "torch.fx.experimental.symbolic_shapes")  # autograd imports the last


def task(cfg: "DictConfig") -> str:
    """Make one run, in whatever process a launcher calls this; return its status."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException  # shown as its text alone, without a traceback
    from hydra.types import RunMode

    from lnjac import errors
    from lnjac.cli.starts import searched
    from lnjac.config import compose, schema
    from lnjac.escape import visible_lines
    from lnjac.machine import keep_freed_memory
    from lnjac.training import run as train

    keep_freed_memory()
    spare_compiler()
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    try:
        settings = schema.build(compose.plain(cfg), job.runtime.choices, compose.folders(job.runtime))
        corpus = train.admit(settings)
        reuse = searched(
            cfg.reuse, OUTPUTS if job.mode == RunMode.RUN and OUTPUTS.absolute() in folder.parents else None
        )
        if cfg.dry_run:
            log.info("dry_run: the config is sound%s; nothing was started", train.would_begin(settings, corpus, reuse))
            return "dry_run"
        return train.run(settings, folder, corpus, reuse=reuse)
    except errors.ConfigError as error:
        raise CompactHydraException(visible_lines(str(error))) from None
    except Exception:
        log.exception("the run failed")
        raise
    except KeyboardInterrupt:
        if job.mode == RunMode.RUN:
            log.warning("interrupted: %s", after_interruption(folder))
        raise


@cache
def spare_compiler() -> None:
    """Keep torch's optimizers from importing its compiler, which takes two seconds and is asked for nothing.

    They import it to be left alone by it, so what they wrap is called in its place. Once a process, as an optimizer wraps
    its class's step again when it is made.
    """
    import torch

    for method in vars(torch.optim.Optimizer).values():
        if plain := getattr(method, "__wrapped__", None):  # by torch._disable_dynamo, which calls what it finds here
            plain.__dynamo_disable = plain
    for kind in vars(torch.optim).values():
        if plain := getattr(vars(kind).get("step"), "__wrapped__", None) if isinstance(kind, type) else None:
            kind.step = torch.no_grad()(plain)


def composer(loader: Any, load: "Callable[[list[str]], DictConfig]") -> "RunComposer":
    """Return what composes a sweep's configs (lnjac.sweeps.protocol)."""
    from lnjac.config.compose import RunComposer

    return RunComposer(loader, load)


def plan(composed: "RunComposed", here: bool) -> "Planned":
    """Check a sweep's job and identify its run (lnjac.sweeps.protocol). Raises ConfigError with every problem found."""
    from lnjac.config import identity
    from lnjac.sweeps.protocol import Planned
    from lnjac.training import run as train

    config = composed.build()
    sha256 = train.admit(config, here=here).sha256
    ids = {"run_id": identity.run_id(config, sha256), "diag_id": identity.diag_id(config)}
    return Planned(ids, identity.column_values(config), sha256)


def starts(jobs: "Sequence[Job]", config: "DictConfig", folder: Path, here: bool) -> "Starts":
    """Tell how a sweep's jobs begin (lnjac.sweeps.protocol). Raises ConfigError if `reuse` names no folder."""
    from lnjac.cli import starts as of_jobs

    return of_jobs.starts(jobs, of_jobs.searched(config.reuse, folder), here=here)


def after_interruption(folder: Path) -> str:
    """Return the command that continues an interrupted run, and from where."""
    from lnjac.runs import folder as runs

    if runs.read_status(folder).get("status") in runs.FINISHED:
        return f"the run is finished, in {folder}"
    same = f"run the same command with hydra.run.dir={folder}"
    if (folder / runs.CHECKPOINT).exists():
        return f"{same} to resume from the checkpoint"
    return f"there is no checkpoint yet: {same} to start from the beginning"


def interrupt(signum: int, frame: Any) -> None:
    """End on SIGTERM as on Ctrl-C: with a checkpoint, the status, the merge."""
    raise KeyboardInterrupt(signum)


def main() -> None:
    """Run what the command line asks for, by the configuration in lnjac.config.compose.CONF."""
    signal.signal(signal.SIGTERM, interrupt)
    full = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands every error on, and those that a user can mend are printed here
    try:
        from lnjac import console

        console.steady()
        import hydra  # half a second in which Ctrl-C may come, too
        from hydra.errors import CompactHydraException

        from lnjac.config.compose import as_typed, broken_yaml
        from lnjac.config.schema import CONF
        from lnjac.errors import ConfigError

        try:
            with broken_yaml():
                sys.argv[1:] = as_typed(sys.argv[1:])
                hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
        except (CompactHydraException, ConfigError) as error:
            if full:
                raise
            print(*filter(None, (str(error), error.__cause__ and str(error.__cause__))), sep="\n", file=sys.stderr)
            sys.exit(1)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        number = stop.args[0] if stop.args else signal.SIGINT
        signal.signal(number, signal.SIG_DFL)  # die of the signal, so that a shell's loop ends too
        os.kill(os.getpid(), number)
    finally:
        gc.freeze()  # else Python looks for garbage in all that torch and pandas hold before it ends, for most of a second
