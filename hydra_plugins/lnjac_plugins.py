"""Hydra takes sweepers and launchers from this namespace alone (so it has no __init__.py): the code is in lnjac.sweeps."""

from lnjac.sweeps import sweeper
from lnjac.sweeps.launchers import local, ray, slurm


class LnjacSweeper(sweeper.Sweeper):
    """hydra/sweeper=lnjac"""


class LocalLauncher(local.LocalLauncher):
    """hydra/launcher=local"""


class SlurmLauncher(slurm.SlurmLauncher):
    """hydra/launcher=slurm"""


class RayLauncher(ray.RayLauncher):
    """hydra/launcher=ray"""
