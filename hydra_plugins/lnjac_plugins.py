"""Hydra takes sweepers and launchers from this namespace alone (so it has no __init__.py): the code is in lnjac.sweeps."""

from lnjac.sweeps import launchers, sweeper


class LnjacSweeper(sweeper.Sweeper):
    """hydra/sweeper=lnjac"""


class LocalLauncher(launchers.LocalLauncher):
    """hydra/launcher=local"""


class SlurmLauncher(launchers.SlurmLauncher):
    """hydra/launcher=slurm"""


class RayLauncher(launchers.RayLauncher):
    """hydra/launcher=ray"""
