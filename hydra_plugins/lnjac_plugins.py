"""Register the sweeper and launchers of lnjac.sweeps with Hydra, which looks in this namespace alone (hence no __init__)."""

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
