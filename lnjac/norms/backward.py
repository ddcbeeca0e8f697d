"""Give any recognised norm of any model another backward: `set_backward`, undone by its context."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lnjac.norms.calls import FunctionalCall, followed, plain_model, replaying
from lnjac.norms.decompose import wide, wide_dtype
from lnjac.norms.formulas import EXACT, SURROGATES
from lnjac.norms.layers import Factors, Norm, Surrogate, matches
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

FUNCTIONAL_SITE = re.compile(r"(layer|rms)_norm_\d+$|[*?\[]|^all$")
"""A pattern that may mean a call of F.layer_norm or F.rms_norm, whose sites are known only when they are called."""


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
        known = {"exact": EXACT, **SURROGATES}
        if backward not in known:
            raise ValueError(f"no backward is called {backward!r}: choose one of {', '.join(known)}")
        factors = known[backward]
        backward = Factors(backward, ["all"], factors.center, bool(factors.radial), factors.scale)
    patterns = backward.sites if sites is None else [sites] if isinstance(sites, str) else list(sites)
    return Backwards(model, backward, patterns, adapters or {})


class Backwards:
    """Backwards given to norms of a model. `sites`: the names of the norms, in order of definition."""

    def __init__(self, model: nn.Module, rule: Surrogate, patterns: list[str], adapters: Mapping[Any, Adapter]) -> None:
        self.model, self.rule, self.patterns, self.adapters = plain_model(model), rule, patterns, adapters
        modules = candidates(self.model, adapters)
        self.modules = set(modules.values())
        for pattern in patterns:
            if not any(matches(site, [pattern]) for site in modules) and not FUNCTIONAL_SITE.search(pattern):
                raise ValueError(f"no norm is called {pattern!r}: the model has {', '.join(modules) or 'none'}")
        self.sites = [site for site in modules if matches(site, patterns)]
        self.called: set[str] = set()
        self.evaluated: set[str] = set()  # functional sites called without grad
        self.stack = ExitStack()
        for site in self.sites:
            module = modules[site]
            self.stack.callback(setattr, module, "backward_rule", declared(module))
            object.__setattr__(module, "backward_rule", rule)
            if not isinstance(module, Norm):  # lnjac's own reads its rule itself
                for handle in _hooked(site, module, rule, adapter_of(module, adapters)):
                    self.stack.callback(handle.remove)

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
    rule: Surrogate | None = getattr(module, "backward_rule", None)
    return rule


_HOOKS: WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], Callable[..., Any]]] = WeakKeyDictionary()
"""What `set_backward` does before and after the forward of a norm that is not lnjac's own."""


def declared_forward(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype, state: Mapping[str, Tensor]
) -> Callable[[Tensor], Any]:
    """Return a norm's own forward with its declared backward, as `own_forward` does with the exact one."""
    forward = own_forward(module, args, kwargs, dtype, state, exact=not isinstance(module, Norm))
    if isinstance(module, Norm):
        return forward
    enter, leave = _HOOKS[module]

    def declared(x: Tensor) -> Any:
        given, named = enter(module, (x, *args), dict(kwargs))
        return leave(module, given, named, forward(given[0]))

    return declared


def _hooked(site: str, module: nn.Module, rule: Surrogate, adapter: Adapter | None) -> list[RemovableHandle]:
    """Give a norm of another class the backward; return the handles of the hooks that do.

    Its forward gets its input without a gradient, so that the parameters' gradients are its own; a term of value 0 adds the
    input's.
    """
    inputs: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    verified = False

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(kwargs)
        if args:
            x, rest = args[0], args[1:]
            inputs.append((x, rest, named))
            return (x.detach(), *rest), named
        key = next(iter(named))
        inputs.append((named[key], (), {name: value for name, value in named.items() if name != key}))
        return args, {**named, key: named[key].detach()}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal verified
        if not inputs:
            return output
        x, rest, named = inputs.pop()
        if output is None or not torch.is_grad_enabled() or x.numel() == 0:
            return output
        try:
            with replaying():
                norm = recognise(module, x, rest, named, adapter)
            if not verified:
                require_formula(norm, norm.tokens(x.detach()), norm.tokens(output.detach()))
                verified = True
        except Unrecognised as error:
            raise ValueError(f"{site} ({type(module).__name__}) can have no other backward: {error}") from None
        return _with_gradient(rule, norm, x, output)

    _HOOKS[module] = enter, leave
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(leave, with_kwargs=True, prepend=True),
    ]


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
