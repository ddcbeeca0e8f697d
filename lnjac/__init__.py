"""lnjac: what scaling, mean-centring and radial removal each contribute to a LayerNorm's backward pass.

Everything public is here, and is imported when it is first used: `import lnjac` itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lnjac.comparing.compare import compare as compare
    from lnjac.comparing.cost import cost as cost
    from lnjac.comparing.scaling import scaling as scaling
    from lnjac.config.compose import compose as compose
    from lnjac.gpt.feedback import set_credit as set_credit
    from lnjac.norms.backward import set_backward as set_backward
    from lnjac.norms.capture import capture as capture
    from lnjac.norms.probe import probe as probe
    from lnjac.norms.recognise import Layer as Layer
    from lnjac.norms.recognise import Rms as Rms
    from lnjac.reporting.report import report as report
    from lnjac.reporting.verdict import verdict as verdict
    from lnjac.runs.diff import diff as diff
    from lnjac.runs.merge import load as load
    from lnjac.runs.merge import merge as merge
    from lnjac.runs.record import record as record
    from lnjac.training.run import run as run
    from lnjac.training.saved_run import Run as Run
    from lnjac.training.saved_run import load_run as load_run

__version__ = "0.1.0"

_HOME = {
    "Layer": "norms.recognise",
    "Rms": "norms.recognise",
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
    "set_credit": "gpt.feedback",
    "verdict": "reporting.verdict",
}
"""The public names, and the module that each lives in."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lnjac' has no attribute {name!r}")
    return getattr(import_module(f"lnjac.{_HOME[name]}"), name)
