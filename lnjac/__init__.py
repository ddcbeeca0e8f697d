"""lnjac: what scaling, mean-centring and radial removal each contribute to a LayerNorm's backward pass.

Everything public is here, and is imported when it is first used: `import lnjac` itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lnjac.comparing.compare import compare
    from lnjac.comparing.cost import cost
    from lnjac.comparing.scaling import scaling
    from lnjac.config.compose import compose
    from lnjac.norms.backward import set_backward
    from lnjac.norms.capture import capture
    from lnjac.norms.probe import probe
    from lnjac.reporting.report import report
    from lnjac.runs.diff import diff
    from lnjac.runs.merge import load, merge
    from lnjac.runs.record import record
    from lnjac.training.run import run
    from lnjac.training.saved_run import Run, load_run

__version__ = "0.1.0"

_HOME = {
    "Run": "training.saved_run",
    "capture": "norms.capture",
    "compare": "comparing.compare",
    "compose": "config.compose",
    "cost": "comparing.cost",
    "diff": "runs.diff",
    "load": "runs.merge",
    "load_run": "training.saved_run",
    "merge": "runs.merge",
    "probe": "norms.probe",
    "record": "runs.record",
    "report": "reporting.report",
    "run": "training.run",
    "scaling": "comparing.scaling",
    "set_backward": "norms.backward",
}
"""The public names, and the module that each lives in."""

__all__ = [  # noqa: PLE0604, RUF100 (written out for readers; a test holds it equal to _HOME)
    "Run",
    "__version__",
    "capture",
    "compare",
    "compose",
    "cost",
    "diff",
    "load",
    "load_run",
    "merge",
    "probe",
    "record",
    "report",
    "run",
    "scaling",
    "set_backward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lnjac' has no attribute {name!r}")
    return getattr(import_module(f"lnjac.{_HOME[name]}"), name)
