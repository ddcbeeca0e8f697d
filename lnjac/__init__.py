"""lnjac: what scaling, mean-centring and radial removal each contribute to a LayerNorm's backward pass.

`load_run(folder)` re-opens a finished run, and imports torch only when a model is asked for. For a model of your own:
`from lnjac.analyse import analyse`.
"""

from lnjac.replay import Run, load_run

__all__ = ["Run", "__version__", "load_run"]
__version__ = "0.1.0"
