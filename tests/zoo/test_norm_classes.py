"""Each norm class of transformers' models and of timm's layers alone, between two linear maps, against the oracle.

Classes whose forward is the same code are one kind; one of each kind is built.
"""

import ast
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.walking import OTHER_KINDS, walk
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra [zoo]: make test-zoo installs it")
layers = pytest.importorskip("timm.layers", reason="needs the extra [zoo]: make test-zoo installs it")

D = 8

IN_NORMS_NAME = ("Conv", "Layer_", "Encoder", "Estimator", "Head", "Mlp", "Adapter", "Attractor", "Block", "Feature")


def kinds() -> Iterator[tuple[str, str]]:
    """Yield the module and the name of one class of each kind of transformers', by the code of its methods."""
    known = set()
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or "norm" not in node.name.lower() or OTHER_KINDS.search(node.name):
                continue
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name != "extra_repr"]
            if any("nn.Linear" in (text := ast.unparse(part)) or "nn.Conv" in text for part in methods):
                continue  # a layer with a norm in it
            code = "".join([*map(ast.unparse, [*node.bases, *methods])]).replace(node.name, "")
            if code not in known:
                known.add(code)
                yield f"transformers.models.{file.parent.name}.{file.stem}", node.name
