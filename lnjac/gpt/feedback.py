"""Give linear layers of any model another way back for errors: `set_credit`, undone by its context."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lnjac.gpt.credit import Feedback, Layers, backprop
from lnjac.gpt.methods import (
    Distribution,
    FeedbackAlignment,
    FeedbackMethod,
    KolenPollack,
    Policy,
    SignSymmetric,
    Transpose,
)
from lnjac.norms.calls import plain_model, site_name
from lnjac.norms.layers import listed, matches
from lnjac.seeding import normal, stream

METHODS: dict[str, Callable[..., FeedbackMethod]] = {
    "fa": FeedbackAlignment,
    "usf": functools.partial(SignSymmetric, uniform=True, redraw=False),
    "frsf": functools.partial(SignSymmetric, uniform=False, redraw=False),
    "brsf": functools.partial(SignSymmetric, uniform=False, redraw=True),
    "kp": KolenPollack,
}
"""The methods that are their layers' feedback alone, as conf/method has them."""


def set_credit(
    model: nn.Module,
    method: str | FeedbackMethod = "fa",
    *,
    only: str | Iterable[str] = "all",
    skip: str | Iterable[str] = (),
    seed: int = 1337,
    distribution: str = "normal",
    scale: float = 1.0,
    decay: float = 10.0,
) -> Credit:
    """Pass errors back through the linear layers of a model by feedback in place of their transposed weights.

        with lnjac.set_credit(model, "fa", skip=["lm_head"], seed=1) as credit:
            for batch in batches:
                loss(model, batch).backward()
                credit.before_update()
                optimizer.step()

    A layer's output stays the same to rounding, its input gradient becomes g·B, and its weight and bias gradients stay true
    given g. The methods are those of our own GPT: fa (Lillicrap et al. 2016, Nat. Commun. 7:13276), the sign-symmetric usf,
    frsf and brsf (Liao et al. 2016; Moskovitz et al. 2018, arXiv 1812.06488) and kp (Akrout et al. 2019, arXiv 1904.05391).

    The feedback is there at once, and until the end of the `with` block or `undo()`. Layers are nn.Linear and transformers'
    Conv1D. Call it once the weights are drawn or loaded, because B gets the root mean square of W at that time.

    Args:
        model: Any module.
        method: `fa`, `usf`, `frsf`, `brsf` or `kp`, or a FeedbackMethod of your own, which holds the last three options.
        only: Dotted names of layers, their last parts, or globs of either; every linear layer unless given.
        skip: Layers to leave as they are, named likewise.
        seed: Each layer draws from a stream of this seed and of the layer's name.
        distribution: `normal` or `uniform`, of M.
        scale: M's spread in units of W's.
        decay: kp's weight decay of W and B, which `Credit.groups` gives to the optimizer.

    Returns:
        The feedback given: `.layers` are the layers' names, `.before_update()` is called between `backward()` and the
        optimizer's step, `.undo()` takes the feedback away.

    Raises:
        ValueError: No method has this name, a pattern matches no linear layer, or a chosen layer cannot have feedback: it
            computes its output in its own way, shares its weight, or has feedback already. In the first backward pass, a
            layer's gradients are not those of its feedback, because something multiplies by its weight without calling it.
    """
    if isinstance(method, str):
        method = _method(method, distribution, scale, decay)
    if not method.layerwise:
        raise ValueError(
            f"{type(method).__name__} is not feedback of layers alone: train lnjac's GPT by it (python run.py)"
        )
    model = plain_model(model)
    return Credit(model, method, _chosen(model, listed(only), listed(skip)), seed)


class Credit:
    """Feedback given to layers of a model. `layers`: the names of the layers, in order of definition."""

    def __init__(self, model: nn.Module, method: FeedbackMethod, chosen: Mapping[str, nn.Module], seed: int) -> None:
        self.model, self.method, self.seed = model, method, seed
        self.layers, self.updates = list(chosen), 0
        self.given: Layers = []
        self.versions: tuple[int, int] | None = None
        with ExitStack() as stack:
            for name, module in chosen.items():
                layer, restore = _converted(module)
                stack.callback(restore)
                self.given.append((name, layer))
            method.give(self.given, seed)
            for name, layer in self.given:
                stack.callback(FirstPass(name, layer, stream(seed, "canary", name)).release)
            first = self.given[0][1].weight
            if method.changes and first.requires_grad:
                stack.callback(_hooked(first, lambda grad: self._require_change()).remove)
            self.stack = stack.pop_all()

    def before_update(self) -> None:
        """Change the feedback for the next update. kp and brsf need it; the other methods do nothing here.

        Call it after `backward()` and the clipping of gradients, and before the optimizer's step. Under kp each B gets its
        weight's gradient, by which the optimizer then changes both. Under brsf the magnitudes of the next update are drawn.
        """
        self.method.follow(self.given)
        self.updates += 1
        with torch.no_grad():
            self.method.renew(self.given, self.seed, self.updates)

    def groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer: the model's parameters, and under kp the feedback too.

        Args:
            weight_decay: The decay of all parameters but kp's W and B, which decay by kp's own.
        """
        parameters = list(self.model.parameters())
        if not isinstance(self.method, KolenPollack):
            return [{"params": parameters, "weight_decay": weight_decay}]
        weights = [layer.weight for _, layer in self.given]
        followed = set(map(id, weights))
        return [
            {"params": [*weights, *self._stored().values()], "weight_decay": self.method.decay},
            {"params": [p for p in parameters if id(p) not in followed], "weight_decay": weight_decay},
        ]

    def backprop(self) -> AbstractContextManager[None]:
        """Return a context within which every gradient of the model is the true one."""
        return backprop(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return each layer's stored matrix M and its spread, and the number of updates. The model's state dict has none."""
        spreads = {f"{name}.init_std": torch.tensor(layer.init_std, dtype=torch.float64) for name, layer in self.given}
        return {**self._stored(), **spreads, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: The state is that of other layers.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise ValueError(f"the saved feedback does not fit at {name}: call set_credit as before it was saved")
        for name, value in self._stored().items():
            value.copy_(state[name])
        for name, layer in self.given:
            layer.init_std = float(state[f"{name}.init_std"])
        self.updates = int(state["updates"])

    def undo(self) -> None:
        """Give the layers their transposed weights back."""
        self.stack.close()

    def __enter__(self) -> Credit:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _stored(self) -> dict[str, Tensor]:
        return {f"{name}.feedback": layer.feedback for name, layer in self.given if layer.feedback is not None}

    def _require_change(self) -> None:
        """Refuse a backward pass after an update that changed the first layer's weight and not its feedback."""
        layer = self.given[0][1]
        assert layer.feedback is not None
        before, self.versions = self.versions, (layer.weight._version, layer.feedback._version)
        if before is not None and before[0] != self.versions[0] and before[1] == self.versions[1]:
            raise ValueError(
                f"{self.method.name}: the weight of {self.layers[0]} changed and its feedback did not: "
                "call credit.before_update() before optimizer.step(), and make the optimizer of credit.groups()"
            )


class FirstPass:
    """The proof that a layer's first backward pass took the way through its feedback.

    The layer's input gradient must be g·B, and its weight's whole gradient the sum of gᵀ·x over its calls. Both are compared
    as products with one random vector v, (in,), so that no input is kept: dx·v with g·(B·v), and dW·v with gᵀ·(x·v).
    """

    TOLERANCE = 0.05
    """Relative. Rounding in bf16 stays far below it, and another matrix than B differs by about 1."""

    def __init__(self, name: str, layer: Feedback, generator: np.random.Generator) -> None:
        self.name, self.layer = name, layer
        self.v = normal((layer.matrix.shape[1],), generator)
        self.due: dict[int, Tensor] = {}  # gᵀ·(x·v), (out,), by backward pass
        # compiled code has no hooks: the first pass runs uncompiled
        self.output: Callable[[Feedback, Tensor], Tensor] = torch.compiler.disable(self._output)  # type: ignore[no-untyped-call]
        self.handle = _hooked(layer.weight, self._weight_arrived) if layer.weight.requires_grad else None
        if self.handle is not None:  # the weight's other hooks may clip its gradient: they come after this one
            hooks: Any = layer.weight._backward_hooks
            others = {key: hooks.pop(key) for key in list(hooks) if key != self.handle.id}
            hooks.update(others)
        layer.canary = self

    def release(self) -> None:
        self.layer.canary = None
        if self.handle is not None:
            self.handle.remove()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model has the feedback without the hooks."""

    def _output(self, layer: Feedback, x: Tensor) -> Tensor:
        x = x.view_as(x)  # its gradient is this call's alone
        operands = layer.operands(x)
        y = layer.output(*operands)
        if not y.requires_grad:
            return y
        used, _, _, back = operands
        with _plainly(x):
            v = self._v_for(back)
            x_v, b_v = used.detach().to(v.dtype) @ v, back.to(v.dtype) @ v
        g_b_v = [b_v]

        def output_arrived(g: Tensor) -> None:
            with _plainly(g):
                wide = g.to(v.dtype)
                g_b_v[0] = wide @ b_v
                passed = wide.reshape(-1, wide.shape[-1]).t() @ x_v.reshape(-1)
                task = torch._C._current_graph_task_id()
                self.due[task] = self.due[task] + passed if task in self.due else passed

        def input_arrived(dx: Tensor) -> None:
            with _plainly(dx):
                proven = self._agree(dx.to(v.dtype) @ v, g_b_v[0], back.dtype, "input's gradient is not g·B")
            if proven and self.handle is None and layer.feedback_rule is not None:
                self.release()

        _hooked(y, output_arrived)
        if x.requires_grad:
            _hooked(x, input_arrived)
        return y

    def _weight_arrived(self, grad: Tensor) -> None:
        due = self.due.pop(torch._C._current_graph_task_id(), None)
        with _plainly(grad):
            v = self._v_for(grad)
            found = self.layer.oriented(grad).to(v.dtype) @ v
            due = torch.zeros_like(found) if due is None else due.to(found)
            proven = self._agree(found, due, grad.dtype, "weight's gradient is not gᵀ·x of the layer's calls")
        if proven and self.layer.feedback_rule is not None:
            self.release()

    def _v_for(self, tensor: Tensor) -> Tensor:
        return self.v.to(tensor.device, torch.float64 if tensor.dtype == torch.float64 else torch.float32)

    def _agree(self, found: Tensor, due: Tensor, dtype: torch.dtype, problem: str) -> bool:
        """Return whether two gradients' products with v agree, which zeros and numbers that are not finite do not prove."""
        off, size = float((found - due).norm()), float(found.norm() + due.norm())
        if not (math.isfinite(off) and math.isfinite(size)):
            return False
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of numbers that underflow
        if off > self.TOLERANCE * size + step * float(self.v.abs().sum()) * math.sqrt(found.numel()):
            raise ValueError(
                f"{self.name}: its {problem}, because something uses its weight without calling it, or wraps it: "
                f"leave it out with skip=[{_short(self.name)!r}]"
            )
        return size > 0


def _hooked(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _plainly(tensor: Tensor) -> ExitStack:
    """Return a context without autocast that records no graph."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack


def _method(name: str, distribution: str, scale: float, decay: float) -> FeedbackMethod:
    if name not in METHODS:
        raise ValueError(f"no method of feedback is called {name!r}: choose one of {', '.join(METHODS)}")
    if distribution not in set(Distribution):
        raise ValueError(
            f"distribution={distribution!r} is unknown: choose one of {', '.join(Distribution.__members__)}"
        )
    for key, value in (("scale", scale), ("decay", decay)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{key}={value} must be positive and finite")
    more = {"decay": decay} if name == "kp" else {}
    every = Policy(*[Transpose.random] * 5)
    return METHODS[name](name=name, policy=every, distribution=Distribution(distribution), scale=scale, **more)


def _chosen(model: nn.Module, only: list[str], skip: list[str]) -> dict[str, nn.Module]:
    """Return the linear layers that match, by name, each of which can have feedback."""
    linear = {site_name(name): module for name, module in model.named_modules() if _is_linear(module)}
    for pattern in (*only, *skip):
        if not any(matches(name, [pattern]) for name in linear):
            raise ValueError(f"no linear layer is called {pattern!r}: the model has {', '.join(linear) or 'none'}")
    chosen = {name: m for name, m in linear.items() if matches(name, only) and not matches(name, skip)}
    if not chosen:
        raise ValueError("no linear layer is left to give feedback: choose others by only= and skip=")
    owners: dict[int, list[str]] = {}
    for place, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{site_name(place)}.{leaf}")
    for name, module in chosen.items():
        problem = _problem(module)
        if problem is None and len(shared := owners[id(module.weight)]) > 1:
            problem = f"shares one matrix as {' and '.join(shared)}, which would get two kinds of gradient: untie them"
        if problem is not None:
            what = f"{name or 'the model'} ({type(module).__name__})"
            raise ValueError(f"{what} {problem}, or leave it out with skip=[{_short(name)!r}]")
    return chosen


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Feedback) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module has the attributes of transformers' Conv1D: `nf`, weight (in, nf) and bias (nf,)."""
    if not isinstance(nf := getattr(module, "nf", None), int):
        return False
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight", "bias"} or any(map(is_lazy, parameters.values())):
        return False
    weight, bias = parameters["weight"], parameters["bias"]
    return weight.ndim == 2 and weight.shape[1] == nf and tuple(bias.shape) == (nf,)


def _problem(module: nn.Module) -> str | None:
    """Return why a linear layer cannot have feedback, with the remedy; None if it can."""
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "computes its weight from other tensors: remove the parametrization"
    if is_lazy(weight) or weight.is_meta:
        return "has no values yet: load or draw them first"
    if isinstance(module, Feedback):
        return None if module.feedback_rule is None else "has feedback already: undo it first"
    if not weight.is_floating_point():
        return f"holds its weight in {weight.dtype}: load the model unquantised"
    if not weight.any():
        return "has a weight of zeros, from which B gets its spread: draw it first"
    if "forward" in vars(module) or (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward):
        return "has a forward of its own: use nn.Linear's"
    if not isinstance(module, nn.Linear) and not _multiplies(module):
        return "does not compute x·W + b: use nn.Linear"
    return None


@torch.no_grad()
def _multiplies(module: nn.Module) -> bool:
    """Return whether a layer like Conv1D gives x·W + b for two random tokens."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    x = normal((2, weight.shape[0]), stream(0, "tokens")).to(weight)
    found, due = type(module).forward(module, x), F.linear(x, weight.t(), module.bias)  # type: ignore[arg-type]
    return bool((found - due).norm() <= FirstPass.TOLERANCE * due.norm())


def _converted(module: nn.Module) -> tuple[Feedback, Callable[[], None]]:
    """Make a linear layer one with feedback; return it with the function that makes it what it was.

    Its class gets `Feedback` before it, and M is a buffer that is not persistent: it moves with the model, and the model's
    state dict stays that of its authors, whose checkpoints load strictly.
    """
    if isinstance(module, Feedback):
        module.register_buffer("feedback", None, persistent=False)

        def take_away() -> None:
            module.feedback_rule = None
            module.register_buffer("feedback", None)

        return module, take_away
    own = type(module)
    converted = type(f"Feedback{own.__name__}", (Feedback, own), {"__module__": __name__})
    module.__class__ = converted
    assert isinstance(module, Feedback)
    module.register_buffer("feedback", None, persistent=False)
    module.init_std = float(module.weight.detach().double().square().mean().sqrt())
    module.transposed = not isinstance(module, nn.Linear)

    def restore() -> None:
        module.feedback_rule = None
        if type(module) is converted:  # otherwise another library has put its own class before it since
            del module.feedback
            for leaf in ("feedback_rule", "init_std", "transposed", "canary"):
                vars(module).pop(leaf, None)
            module.__class__ = own  # type: ignore[assignment]

    return module, restore


def _short(name: str) -> str:
    """Return a layer's last part, which layers like it share; its whole name if that part is a number."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last
