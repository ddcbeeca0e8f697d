"""Give any recognised norm of any model another backward: `set_backward`, undone by its context."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lnjac.norms.calls import FunctionalCall, followed, plain_model, replaying, site_name
from lnjac.norms.decompose import wide, wide_dtype
from lnjac.norms.formulas import BACKWARDS
from lnjac.norms.layers import Factors, Norm, Surrogate, listed, matches
from lnjac.norms.recognise import (
    Adapter,
    NormFormula,
    Unrecognised,
    adapter_of,
    candidates,
    own_forward,
    recognise,
    recognise_function,
    require_formula,
)


def set_backward(
    model: nn.Module,
    backward: str | Surrogate,
    *,
    sites: str | Iterable[str] | None = None,
    adapters: Mapping[Any, Adapter] | None = None,
) -> Backwards:
    """Give norms of a model another backward. Their outputs stay the same.

        with lnjac.set_backward(model, "center_scale", sites="ln_f"):
            train(model)

    The backward is there at once, and until the end of the `with` block or `undo()`. Norms that do not match keep theirs.
    F.layer_norm and F.rms_norm called by no norm module are reached within a `with` block alone.

    Args:
        model: Any module.
        backward: `exact`, one of the seven surrogates (`center_scale`, `projected`, `ste`, `scale`, `radial_scale`, `center`,
            `radial`), or a Surrogate of your own.
        sites: Dotted names of norms, their last parts, or globs of either; every norm unless given.
        adapters: As for `lnjac.probe`.

    Returns:
        The backwards given: `.sites` are the norms' names, `.undo()` takes the backwards away.

    Raises:
        ValueError: No backward has this name, or a pattern matches no norm; at a module's first call, if it is no norm.
    """
    if isinstance(backward, str):
        if backward not in BACKWARDS:
            raise ValueError(f"no backward is called {backward!r}: choose one of {', '.join(BACKWARDS)}")
        factors = BACKWARDS[backward]
        backward = Factors(backward, ["all"], factors.center, bool(factors.radial), factors.scale)
    patterns = backward.sites if sites is None else listed(sites)
    return Backwards(model, backward, patterns, adapters or {})


class Backwards:
    """Backwards given to norms of a model. `sites`: the names of the norms, in order of definition."""

    def __init__(self, model: nn.Module, rule: Surrogate, patterns: list[str], adapters: Mapping[Any, Adapter]) -> None:
        self.model, self.rule, self.patterns, self.adapters = plain_model(model), rule, patterns, adapters
        modules = candidates(self.model, adapters)
        self.modules = set(modules.values())
        for pattern in patterns:
            if not any(matches(site, [pattern]) for site in modules) and not self._may_be_functional(pattern):
                raise ValueError(f"no norm is called {pattern!r}: the model has {', '.join(modules) or 'none'}")
        self.sites = [site for site in modules if matches(site, patterns)]
        self.called: set[str] = set()
        self.evaluated: set[str] = set()  # functional sites called without grad
        self.stack = ExitStack()
        for site in self.sites:
            self.stack.callback(_give(modules[site], _Given(site, rule, adapter_of(modules[site], adapters))))

    def _may_be_functional(self, pattern: str) -> bool:
        """Return whether the pattern may mean a call of F.layer_norm or F.rms_norm, known only when it is called."""
        number = re.search(r"\d+$", pattern)
        names = [f"{name}_{number.group() if number else 0}" for name in ("layer_norm", "rms_norm")]
        inside = [
            ".".join(filter(None, [site_name(name), call])) for name, _ in self.model.named_modules() for call in names
        ]
        return any(matches(site, [pattern]) for site in (*inside, "layer_norm", "rms_norm"))

    def undo(self) -> None:
        """Give the norms the backwards back that they had before."""
        self.stack.close()

    def __enter__(self) -> Backwards:
        if any(
            pattern == "all" or not any(matches(site, [pattern]) for site in self.sites) for pattern in self.patterns
        ):
            _ACTIVE.append(self)
            self.stack.callback(_ACTIVE.remove, self)
            self.stack.enter_context(followed(self.model, lambda *_: None, self._function))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.undo()
        lost = [p for p in self.patterns if not any(matches(site, [p]) for site in (*self.sites, *self.called))]
        if lost and kind is None:
            warnings.warn(f"no norm called {', '.join(lost)} was called: its backward was not replaced", stacklevel=2)
        if (without := sorted(self.evaluated - self.called)) and kind is None:
            warnings.warn(f"{', '.join(without)} ran without grad alone: its backward was not replaced", stacklevel=2)

    def _function(self, call: FunctionalCall, run: Callable[[Tensor], Tensor]) -> Tensor:
        if any(frame.module in self.modules for frame in call.frames):
            return run(call.x)
        site = call.numbered()
        if not matches(site, self.patterns):
            return run(call.x)
        (self.called if torch.is_grad_enabled() else self.evaluated).add(site)
        return self.replaced(call, call.x, run(call.x.detach()))

    def replaced(self, call: FunctionalCall, x: Tensor, output: Tensor) -> Tensor:
        """Return the output with this backward, computed from x without its gradient."""
        return _with_gradient(self.rule, recognise_function(call), x, output)

    def through(self, call: FunctionalCall, x: Tensor) -> Tensor:
        """Return the function of x as it was called, with this backward, in float32 at least."""
        return self.replaced(call, x, call.on(x.detach(), wide_dtype(x.dtype)))


_ACTIVE: list[Backwards] = []
"""The backwards of functional norms that are in force, the innermost last."""


def functional_backward(site: str) -> Backwards | None:
    """Return what gave the functional norm its backward; None if it has the exact one."""
    return next((one for one in reversed(_ACTIVE) if matches(site, one.patterns)), None)


def declared(module: nn.Module) -> Surrogate | None:
    """Return a norm's declared backward; None for the exact one."""
    if isinstance(module, Norm):
        return module.backward_rule
    given: list[_Given] | None = vars(module).get(GIVEN)
    return given[-1].rule if given else None


def declared_forward(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype, state: Mapping[str, Tensor]
) -> Callable[[Tensor], Any]:
    """Return a norm's own forward with its declared backward, as `own_forward` does with the exact one."""
    forward = own_forward(module, args, kwargs, dtype, state, exact=not isinstance(module, Norm))
    if isinstance(module, Norm):
        return forward
    given: _Given = vars(module)[GIVEN][-1]

    def declared(x: Tensor) -> Any:
        (plain, *_), _ = given.detached((x, *args), dict(kwargs))
        return given.with_gradient(module, forward(plain))

    return declared


GIVEN = "backwards_given"
"""The attribute of a norm that lists the backwards given to it, the one in force last; gone when there are none."""


class _Given:
    """A backward given to a norm, by hooks if it is not lnjac's own class, which reads its rule itself.

    The norm's forward gets its input without a gradient, so that the parameters' gradients are its own; a term of value 0
    adds the input's. The hooks are the module's, and go with a copy of it.
    """

    def __init__(self, site: str, rule: Surrogate | None, adapter: Adapter | None = None) -> None:
        self.site, self.rule, self.adapter = site, rule, adapter
        self.inputs: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.verified = False

    def detached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep a call's input, and return its arguments with the input detached."""
        named = dict(kwargs)
        if args:
            x, rest = args[0], args[1:]
            self.inputs.append((x, rest, named))
            return (x.detach(), *rest), named
        key = next(iter(named))
        self.inputs.append((named[key], (), {name: value for name, value in named.items() if name != key}))
        return args, {**named, key: named[key].detach()}

    def with_gradient(self, module: nn.Module, output: Any) -> Any:
        """Return the output of the call whose input was kept last, with this backward's gradient."""
        x, rest, named = self.inputs.pop()
        if output is None or not torch.is_grad_enabled():  # None: the forward has raised
            return output
        assert self.rule is not None
        try:
            with replaying():
                norm = recognise(module, x, rest, named, self.adapter)
                if (
                    not self.verified and x.numel()
                ):  # in float32 at least: rounding in bfloat16 would hide another function
                    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                        y = own_forward(module, rest, named, wide_dtype(x.dtype))(x.detach())
                    require_formula(norm, norm.tokens(x.detach()), norm.tokens(y))
                    self.verified = True
        except Unrecognised as error:
            raise ValueError(f"{self.site} ({type(module).__name__}) can have no other backward: {error}") from None
        return _with_gradient(self.rule, norm, x, output)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.detached(args, kwargs) if vars(module)[GIVEN][-1] is self else None

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.with_gradient(module, output) if vars(module)[GIVEN][-1] is self and self.inputs else output


def _compile_anew() -> None:
    """Let compiled code be compiled again when it is next called: torch.compile does not notice hooks added later."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
        torch._dynamo.reset()


def _give(module: nn.Module, given: _Given) -> Callable[[], None]:
    """Give a norm a backward; return what takes it away, in whatever order those of several are called."""
    stack: list[_Given] = vars(module).setdefault(GIVEN, [_Given(given.site, declared(module))])
    stack.append(given)
    handles: list[RemovableHandle] = []
    if isinstance(module, Norm):
        module.backward_rule = given.rule
    else:
        handles = [
            module.register_forward_pre_hook(given.enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(given.leave, with_kwargs=True, prepend=True, always_call=True),
        ]
        _compile_anew()

    def take() -> None:
        stack.remove(given)
        if isinstance(module, Norm):
            module.backward_rule = stack[-1].rule
        else:
            for handle in handles:
                handle.remove()
            _compile_anew()
        if len(stack) == 1:
            del vars(module)[GIVEN]

    return take


def _with_gradient(rule: Surrogate, norm: NormFormula, x: Tensor, output: Tensor) -> Tensor:
    """Return the output with a term of value 0 whose gradient with respect to x is the rule's."""
    with torch.autocast(x.device.type, enabled=False):
        tokens = wide(norm.tokens(x))
        surrogate = rule.surrogate(tokens, norm.eps, rms=norm.rms)
        if surrogate is None:
            surrogate = norm.normalised(tokens)
        term = surrogate - surrogate.detach()
        if norm.weight is not None:
            term = term * norm.weight.to(term.dtype)
        return output + norm.untokens(term).to(output.dtype)
