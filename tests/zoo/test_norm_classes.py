"""Each norm class of transformers' models and of timm's layers alone, between two linear maps, against the oracle.

Classes whose methods are the same code are one kind; one of each kind is built.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.walking import OTHER_KINDS, walk
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra [zoo]: make test-zoo installs it")
layers = pytest.importorskip("timm.layers", reason="needs the extra [zoo]: make test-zoo installs it")

D = 8

NOT_NORMS = ("Embedding", "Encoder", "Model", "For", "Attention", "Layer", "Head", "Output", "Intermediate", "Pooler")
"""Words after Norm in the names of what has a norm in it and is none."""


def kinds() -> Iterator[tuple[str, str]]:
    """Yield the module and the name of one class of each kind of transformers', by the code of its methods."""
    known = set()
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or "norm" not in node.name.lower() or OTHER_KINDS.search(node.name):
                continue
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name != "extra_repr"]
            inside = node.name.partition("Norm")[2]
            if not any(part.name == "forward" for part in methods):
                continue
            if inside.startswith(("al", "ed")) or any(word in inside for word in NOT_NORMS):
                continue  # NormalEstimation, NormedEmbedding, PreLayerNormModel
            if "StableLayerNorm" in node.name or "nn.Conv" in ast.unparse(node):
                continue
            code = "".join(map(ast.unparse, [*node.bases, *methods])).replace(node.name, "")
            if code not in known:
                known.add(code)
                yield f"transformers.models.{file.parent.name}.{file.stem}", node.name


def timm_kinds() -> list[str]:
    """Return the names of timm's LayerNorms, RmsNorms and SimpleNorms."""
    names = [name for name in dir(layers) if "Norm" in name and inspect.isclass(getattr(layers, name))]
    return [name for name in names if name.startswith(("LayerNorm", "RmsNorm", "SimpleNorm"))]


def built(cls: type) -> nn.Module | None:
    """Return an instance for 8 channels; None where none of the usual arguments makes one."""
    named = inspect.signature(cls.__init__).parameters
    ways: list[Callable[[], nn.Module]] = [
        lambda: cls(D, group_size=D // 2),
        lambda: cls(eps=1e-6) if list(named)[1] == "eps" else cls(D),
        lambda: cls(D, 4),  # a number of heads
        lambda: cls((2, D // 2)),
        lambda: cls(named["config"].annotation(hidden_size=D, num_attention_heads=2, num_key_value_heads=2)),
        lambda: cls(named["config"].annotation(d_model=D)),
    ]
    for way in ways:
        try:
            return way()
        except Exception:  # of transformers' own classes where a configuration contradicts itself
            continue
    return None


class Between(nn.Module):
    """A norm between two maps, with as many axes as it takes; a second argument is a gate of the first's shape."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        needed = [p for p in inspect.signature(norm.forward).parameters.values() if p.name == "gate"]
        self.before, self.norm, self.after, self.shape = nn.Linear(D, D), norm, nn.Linear(D, D), shape
        self.gate = nn.Linear(D, D) if needed else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x).reshape(self.shape)
        y = self.norm(h) if self.gate is None else self.norm(h, self.gate(x).reshape(self.shape))
        return self.after(y.reshape(-1, D))


SHAPES = [(4, 6, D), (4, 6, 2, D // 2), (3, D, 4, 2), (3, D, D), (4, 3, 2, D)]
"""Of 192 entries each: tokens, heads, images and sequences with their channels second."""


def between(norm: nn.Module) -> Between | None:
    """Return the norm in its model for the first shape that it takes."""
    for shape in SHAPES:
        try:
            model = Between(norm, shape)
            if model(torch.randn(24, D)).shape == (24, D):
                return model
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
    return None


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).tanh().square().mean(), len(x)


CLASSES = [(f"{module.split('.')[2]} {name}", module, name) for module, name in kinds()] + [
    (f"timm {name}", "timm.layers", name) for name in timm_kinds()
]


@pytest.mark.parametrize(
    ("label", "module", "name"),
    [pytest.param(*one, id=one[2]) for one in CLASSES],
)
def test_a_norm_class_has_the_true_rows_or_is_refused(
    label: str, module: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    torch.manual_seed(0)
    norm = built(getattr(importlib.import_module(module), name))
    if norm is None:
        pytest.skip(f"{name} is not built from a number of channels or from its model's configuration")
    model = between(norm)
    if model is None:
        pytest.skip(f"{name} takes no input of the shapes tried, {SHAPES}")
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.rand_like(p) + 0.5)  # some come without values
    seen = walk(model, torch.randn(24, D), loss)
    record_property("zoo", seen.cells(f"one {label}", torch.float32))
    assert seen.faults == []
    assert seen.measured or seen.refused
