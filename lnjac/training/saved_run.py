"""Re-open a finished run: its tables without torch, its model and diagnostic batch with it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnjac.config.schema import PLUGIN_GROUPS, RunConfig, build, held
from lnjac.errors import ConfigError
from lnjac.files import file_sha256
from lnjac.runs import folder as runs
from lnjac.runs import read as sources
from lnjac.trackers.base import NONE

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from torch import Tensor

    from lnjac.gpt.model import GPT


class Run:
    """A finished run's folder. `.layers`, `.run` and `.curve` are its tables as pandas frames.

    A run that another loop recorded (`ours` is False) has no model or diagnostic batch, and its config is a plain dict.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        self.folder, self.trust = Path(folder), trust
        self.status = runs.read_status(self.folder)
        if (state := self.status.get("status")) not in runs.FINISHED:
            said = f"status {state}" if state else runs.no_status(self.folder)
            raise ConfigError(
                f"{folder} is not a finished run ({said}): name a folder whose status is done or diverged"
            )
        _, self.metadata = self.read("runs")
        self.ours = "provenance" in self.metadata

    @cached_property
    def config(self) -> Any:
        """The run's config. Classes of other packages are imported, by their names, only with `trust`."""
        return self._built() if self.ours else self.metadata["config"]

    def _built(self) -> RunConfig:
        plain = self.metadata["config"] | {"tracker": NONE}  # opened again, it tells nobody
        held_by = [held(plain, group) for group in PLUGIN_GROUPS]
        members = [holder[key] for holder, key in held_by] + list(plain["diagnostics"].get("more", {}).values())
        targets = [member["_target_"] for member in members if not isinstance(member, str)]  # a name is ours
        foreign = [target for target in targets if not target.startswith("lnjac.")]
        if foreign and not self.trust:
            raise ConfigError(
                f"{self.folder} names code outside lnjac ({', '.join(foreign)}): if it is yours, "
                "open the run by load_run(folder, trust=True)"
            )
        return build(plain)

    @cached_property
    def layers(self) -> pd.DataFrame:
        return self._frame("layers")

    @cached_property
    def run(self) -> pd.DataFrame:
        return self._frame("runs")

    @cached_property
    def curve(self) -> pd.DataFrame:
        return self._frame("curves")

    def table(self, name: str) -> pd.DataFrame:
        """Return one of the run's tables by name: layers, runs, curves, or one that its diagnostics filled.

        Raises:
            ConfigError: The run has no such table.
        """
        if runs.file_of(name) not in (written := self.status.get("sha256", {})):
            known = {file: table for table, file in runs.FILES.items()}
            there = ", ".join(
                known.get(file, file.removesuffix(".parquet")) for file in written if file.endswith(".parquet")
            )
            more = "diagnostics add tables (docs/diagnostics.md)" if self.ours else "record(…, tables=…) adds tables"
            raise ConfigError(f"{self.folder} has no table {name}, but {there}: {more}")
        return self._frame(name)

    def model(self) -> GPT:
        """Return the model at the run's end, with its weights, feedback and norms' backward, in eval mode on the CPU.

        Raises ConfigError when the run was made with save_model=false, or by another loop than lnjac's.
        """
        self._require_ours("weights")
        from safetensors.torch import load_file

        from lnjac.gpt import model as gpt

        if runs.MODEL not in self.status.get("sha256", {}):  # a file there would be another run's
            raise ConfigError(f"{self.folder} holds no weights: it was run with save_model=false")
        model = gpt.build(self.config, self.metadata["provenance"]["vocab_size"])
        gpt.load_saved(model, load_file(self.verified(runs.MODEL)))
        return model.eval()

    def diagnostic_batch(self) -> tuple[Tensor, Tensor]:
        """Return (idx, targets) of the measurements: (batches, B, T) int64 each."""
        self._require_ours("diagnostic batch")
        from safetensors.torch import load_file

        found = load_file(self.verified(runs.BATCH))
        return found["idx"], found["targets"]

    def _require_ours(self, what: str) -> None:
        if not self.ours:
            raise ConfigError(
                f"{self.folder} was recorded by a loop of your own, of which lnjac keeps no {what}: load it as your "
                "script saved it"
            )

    def _frame(self, name: str) -> pd.DataFrame:
        frame: pd.DataFrame = self.read(name)[0].to_pandas()
        return frame

    def read(self, name: str) -> tuple[pa.Table, dict[str, Any]]:
        """Return a table and its file's note, with schema version, columns and types checked as a merge does."""
        try:
            return sources.read_checked(self.verified(runs.file_of(name)), name)
        except sources.Unfit as error:
            raise ConfigError(f"{self.folder}: {error}") from None

    def verified(self, file: str) -> Path:
        """Return the file's path. Raises ConfigError unless the file is, to the last bit, the one that the run wrote."""
        path = self.folder / file
        if not path.exists() or file_sha256(path) != self.status.get("sha256", {}).get(file):
            raise ConfigError(f"{path} is missing or not the file that the run wrote: run it again")
        return path


def load_run(folder: str | Path, *, trust: bool = False) -> Run:
    """Open a finished run.

    Args:
        folder: The run's folder.
        trust: Import the modules beside lnjac's own that the run's config names.

    Returns:
        The run, with `.config`, `.layers`, `.run`, `.curve` and `.table(name)`; also `.model()` and `.diagnostic_batch()` if
        lnjac's own trainer made it.

    Raises:
        ConfigError: The run's status is neither done nor diverged, or its tables are not those of this lnjac.
    """
    return Run(folder, trust=trust)
