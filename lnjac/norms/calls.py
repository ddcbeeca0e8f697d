"""Follow a model's forward pass: which module is running, and which functional LayerNorm or RMSNorm it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

FUNCTIONS = {F.layer_norm: False, torch.layer_norm: False, F.rms_norm: True, torch.rms_norm: True}
"""The functions that normalise, and whether each is an RMSNorm."""


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile, by whose names sites are called."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def in_backward() -> bool:
    """Return whether a backward pass runs, in which a forward is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def site_name(name: str) -> str:
    """Return a module's dotted name as it would be without torch.compile."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


@dataclass
class Frame:
    """A module that is running: its site, how many functional norms it has called, and what was noted of them.

    `mode` is left when the module is: autograd lays modes aside, but a checkpoint recomputes modules in there.
    """

    site: str
    module: nn.Module
    mode: TorchFunctionMode | None = None
    functional: int = 0
    notes: list[Any] = field(default_factory=list)


@dataclass
class FunctionalCall:
    """A call of F.layer_norm or F.rms_norm, within the running modules `frames`."""

    rms: bool
    x: Tensor
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    frames: list[Frame]

    @property
    def name(self) -> str:
        return "rms_norm" if self.rms else "layer_norm"

    def numbered(self) -> str:
        """Return the call's site: the running module's, the function's name, and how many came before in that module."""
        if not self.frames:
            return self.name
        frame = self.frames[-1]
        frame.functional += 1
        return ".".join(filter(None, [frame.site, f"{self.name}_{frame.functional - 1}"]))

    def on(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the function of another input, in this dtype."""
        weight, bias = (None if p is None else p.detach().to(dtype) for p in (self.weight, self.bias))
        if self.rms:
            return F.rms_norm(x.to(dtype), self.shape, weight, self.eps)
        return F.layer_norm(x.to(dtype), self.shape, weight, bias, self.eps)  # type: ignore[arg-type]


_replays = 0


@contextmanager
def replaying() -> Iterator[None]:
    """Within the context, nobody who follows a model is told of what runs: a norm is run alone once more."""
    global _replays
    _replays += 1
    try:
        yield
    finally:
        _replays -= 1


Handle = Callable[[FunctionalCall, Callable[[Tensor], Tensor]], Tensor]
"""`handle(call, run)`: called in place of the function, `run(x)` being the function of x with its other arguments."""


class _Mode(TorchFunctionMode):
    def __init__(self, frames: list[Frame], handle: Handle) -> None:
        super().__init__()
        self.frames, self.handle = frames, handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS or _replays:
            return func(*args, **kwargs)
        names = ["input", "normalized_shape", "weight", *([] if FUNCTIONS[func] else ["bias"]), "eps"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        call = FunctionalCall(
            FUNCTIONS[func],
            given["input"],
            tuple(given["normalized_shape"]),
            given.get("weight"),
            given.get("bias"),
            given.get("eps", None if FUNCTIONS[func] else 1e-5),
            self.frames,
        )
        return self.handle(call, lambda x: func(x, *args[1:], **rest))


Exit = Callable[[Frame, tuple[Any, ...], dict[str, Any], Any], Any]
"""`on_exit(frame, args, kwargs, output)`: called when a module is done; what it returns, if not None, is the output."""


@contextmanager
def followed(model: nn.Module, on_exit: Exit, handle: Handle) -> Iterator[list[Frame]]:
    """Within the context, tell of each module of the model that ends its forward pass, and of each functional norm.

    Yields:
        The running modules, the outermost first.
    """
    frames: list[Frame] = []
    mode, handles = _Mode(frames, handle), []

    def done() -> None:
        if (entered := frames.pop().mode) is not None:
            entered.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    for name, module in model.named_modules():
        site = site_name(name)

        def enter(module: nn.Module, args: Any, kwargs: Any, site: str = site) -> None:
            if _replays:
                return
            again = mode if in_backward() and mode not in _get_current_function_mode_stack() else None  # type: ignore[no-untyped-call]
            if again is not None:
                again.__enter__()  # type: ignore[no-untyped-call]
            frames.append(Frame(site, module, again))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if _replays:
                return None
            # a module that raised, and one within it, may not have left
            while frames and frames[-1].module is not module:
                done()
            if not frames:
                return None
            try:
                return None if output is None else on_exit(frames[-1], args, kwargs, output)
            finally:
                done()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        with mode:
            yield frames
    finally:
        for one in handles:
            one.remove()
