"""Hydra's own conformance suites for launchers, run against the local one, in this process and in processes of its own.

They look for jobs in the folders that Hydra numbers, so they run under Hydra's sweeper. Each integration test has one job,
which runs in this process in any case.
"""

from collections.abc import Iterator

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from lnjac.sweeps.launchers.local import LocalLauncher

pytestmark = pytest.mark.filterwarnings("ignore:Future Hydra versions")  # its apps name no version


@pytest.fixture(autouse=True)
def _oldest_version() -> Iterator[None]:
    """Hydra behaves as in a new process, whatever version an earlier test has asked for."""
    base = version.VersionBase.instance()
    before = base.getbase()
    version.setbase("1.1")
    yield
    base.version_base = before


def test_hydra_finds_the_launcher() -> None:
    assert LocalLauncher in {base for found in Plugins.instance().discover() for base in found.__mro__}


@pytest.mark.parametrize(("launcher_name", "overrides"), [("local", ["hydra.launcher.jobs=1"])])
class TestOneProcess(LauncherTestSuite): ...


@pytest.mark.rare
@pytest.mark.parametrize(("launcher_name", "overrides"), [("local", ["hydra.launcher.jobs=2"])])
class TestTwoProcesses(LauncherTestSuite): ...


@pytest.mark.rare
@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("local", ["hydra.launcher.jobs=2", "hydra.sweeper.max_batch_size=2"])]
)
class TestBatches(BatchedSweeperTestSuite): ...


@pytest.mark.rare
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=local", "hydra.launcher.jobs=2"])]
)
class TestIntegration(IntegrationTestSuite): ...
