"""Train, analyse and write one run, or with -m a sweep of them: see README.md."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: "DictConfig") -> str:
    from hydra.errors import CompactHydraException  # shown as its text alone, without a traceback

    from lnjac import config, train

    try:
        settings = config.build(cfg)
        corpus = train.admit(settings)
    except config.ConfigError as error:
        raise CompactHydraException(str(error)) from None
    try:
        return train.run(settings, Path(HydraConfig.get().runtime.output_dir), corpus)
    except Exception:
        logging.getLogger("lnjac").exception("the run failed")
        raise


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: this run keeps no rows; finished runs of a sweep are kept and merged", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # die of the signal, so that a shell's loop ends too
        os.kill(os.getpid(), signal.SIGINT)
