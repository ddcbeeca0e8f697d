"""Register the sweeper and launchers of lnjac.sweeps with Hydra, which looks in this namespace alone (hence no __init__)."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lnjac import sweeps
from lnjac.sweeps import sweeper
from lnjac.sweeps.launchers import local, ray, slurm


class LnjacSearchPath(SearchPathPlugin):
    """Lets any app choose hydra/sweeper=lnjac and the launchers."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lnjac", f"file://{Path(sweeps.__file__).parent / 'conf'}")


class LnjacSweeper(sweeper.Sweeper):
    """hydra/sweeper=lnjac"""


class LocalLauncher(local.LocalLauncher):
    """hydra/launcher=local"""


class SlurmLauncher(slurm.SlurmLauncher):
    """hydra/launcher=slurm"""


class RayLauncher(ray.RayLauncher):
    """hydra/launcher=ray"""
