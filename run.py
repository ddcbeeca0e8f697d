"""Train, analyse and write one run, or with -m a sweep of them: see README.md."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("lnjac")


def task(cfg: "DictConfig") -> str:
    """One job, in whatever process a launcher runs it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException  # shown as its text alone, without a traceback
    from hydra.types import RunMode

    from lnjac import config, train

    try:
        settings = config.build(cfg)
        corpus = train.admit(settings)
        job = HydraConfig.get()
        if job.mode == RunMode.RUN and (meant := [word for word in job.overrides.task if word.startswith("sweep=")]):
            raise config.ConfigError(f"{meant[0]} names the folder of a sweep, and this is one run: add -m")
        if cfg.dry_run:
            return "dry_run: the config is sound; nothing was started"
        return train.run(settings, Path(job.runtime.output_dir), corpus)
    except config.ConfigError as error:
        raise CompactHydraException(str(error)) from None
    except Exception:
        log.exception("the run failed")
        raise
    except KeyboardInterrupt:
        if HydraConfig.get().mode == RunMode.RUN:
            log.warning(
                "interrupted: the same command with hydra.run.dir=%s goes on", HydraConfig.get().runtime.output_dir
            )
        raise


def interrupt(signum: int, frame: Any) -> None:
    """SIGTERM ends as Ctrl-C does: a checkpoint, the status, the merge."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        from lnjac import console

        console.steady()
        import hydra  # half a second in which Ctrl-C may come, too

        hydra.main(version_base="1.3", config_path="conf", config_name="config")(task)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # die of the signal, so that a shell's loop ends too
        os.kill(os.getpid(), signal.SIGINT)
