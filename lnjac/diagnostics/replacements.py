"""Choose norms' backwards after the forward pass: one graph gives the gradient under any of them, at any norm.

Notation as in `lnjac.norms.decompose`. The exact pullback and every replaced one are linear in the parts u, z·m, ḡ of g,
so at a single norm a replacement changes the gradient by the pullback, through the layers below, of a combination of five
vectors.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lnjac.norms.capture import Loss
from lnjac.norms.decompose import center, normalise, pull_back, remove_radial, wide
from lnjac.norms.formulas import EXACT, Backward
from lnjac.norms.layers import other_backwards

Gradient = list[Tensor]
"""A tensor for each parameter."""


DOSES = tuple(Backward(True, radial, True) for radial in (0.25, 0.5, 0.75))
"""From center_scale, which subtracts none of z·m, to exact."""


def basis(g: Tensor, z: Tensor, rstd: Tensor, *, rms: bool = False) -> list[Tensor]:
    """Return the vectors that span every (swapped − exact) pullback of g: z·m/σ, u − u/σ, z·m, and ḡ/σ, ḡ without rms."""
    h = g if rms else center(g)
    u = remove_radial(z, h)
    radial, mean = h - u, g - h
    return [radial * rstd, u - u * rstd, radial] + ([] if rms else [mean * rstd, mean])


def coefficients(swap: Backward, *, rms: bool = False) -> list[float]:
    """Return the coefficients of `basis`, in its order."""
    radial, mean, scaled = 1 - swap.radial, float(not swap.center), float(swap.scale)
    unscaled = 1 - scaled
    found = [scaled * radial, unscaled, unscaled * radial]
    return found if rms else [*found, scaled * mean, unscaled * mean]


@dataclass(eq=False)
class Call:
    """One call of a norm in a graph: its input and 1/σ, the backward it has now, g of the first pass that reached it."""

    site: str
    x: Tensor
    rstd: Tensor
    rms: bool
    swap: Backward = EXACT
    g: Tensor | None = None

    @property
    def z(self) -> Tensor:
        """Compute z anew each time: the graph of all calls would be an eighth larger with it."""
        x = self.x.detach().to(self.rstd.dtype)
        return (x if self.rms else center(x)) * self.rstd

    def pull_back(self, g: Tensor) -> Tensor:
        return pull_back(g, self.z, self.rstd, self.swap, rms=self.rms).to(self.x.dtype)

    def change(self) -> Tensor:
        """Return the (swapped − exact) pullback of the exact g."""
        assert self.g is not None
        z = self.z
        swapped, exact = (pull_back(self.g, z, self.rstd, swap, rms=self.rms) for swap in (self.swap, EXACT))
        return (swapped - exact).to(self.x.dtype)


class _Switched(torch.autograd.Function):
    """The identity, whose gradient is pulled back by the backward that its call has then; for this module alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return x.to(call.rstd.dtype).view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        call: Call = ctx.call
        if call.g is None:
            call.g = g
        return call.pull_back(g), None


class _Recorder:
    """A norm's backward (`lnjac.norms.layers.Surrogate`) that notes each call of its site."""

    name = "switched"

    def __init__(self, site: str, calls: list[Call]) -> None:
        self.sites, self.calls = [site], calls

    def surrogate(self, x: Tensor, eps: float, *, rms: bool) -> Tensor:
        precise = wide(x.detach())
        call = Call(self.sites[0], x, normalise(precise, eps, rms=rms).rstd, rms)
        self.calls.append(call)
        switched: Tensor = _Switched.apply(x, call)  # type: ignore[no-untyped-call]
        return switched


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Within the context a forward pass makes its norms switchable; yield the list of their calls, in forward order."""
    calls: list[Call] = []
    with other_backwards(model, lambda site: _Recorder(site, calls)):
        yield calls


class Graph:
    """The graph of one batch's share·loss, share being its part of all `total` tokens. No `.grad` is touched.

    `exact` is the gradient with every norm's exact backward, whatever the model trains with. What a swap cannot change of
    it is given out as the very tensor that stands there.
    """

    def __init__(self, model: nn.Module, batch: Any, loss: Loss, parameters: Sequence[Tensor], total: int) -> None:
        with recording(model) as self.calls:
            value, tokens = loss(model, batch)
        self.loss, self.parameters = value * (tokens / total), parameters
        found = self._pull([self.loss])
        self.exact = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def swapped(self, sites: Collection[str], swaps: Sequence[Backward]) -> Iterator[Gradient]:
        """Yield for each swap the gradient with it at these sites, exact elsewhere."""
        calls = [call for call in self.calls if call.site in sites and call.g is not None]
        return self._at_one(calls[0], swaps) if len(calls) == 1 else self._together(calls, swaps)

    def _at_one(self, call: Call, swaps: Sequence[Backward]) -> Iterator[Gradient]:
        """Serve all swaps by at most five passes through the layers below."""
        assert call.g is not None
        parts = basis(call.g, call.z, call.rstd, rms=call.rms)
        deltas = list(zip(*(self._pull([call.x], [part.to(call.x.dtype)]) for part in parts), strict=True))
        for swap in swaps:
            c = coefficients(swap, rms=call.rms)
            yield [_changed(g, c, of_one) for g, of_one in zip(self.exact, deltas, strict=True)]

    def _together(self, calls: Sequence[Call], swaps: Sequence[Backward]) -> Iterator[Gradient]:
        """Serve each swap by a pass of the change alone through the layers below.

        With g the exact gradient at a norm and δ what reaches it from the norms above that are changed too,
        swapped(g + δ) − exact(g) = swapped(δ) + (swapped − exact)(g): its own pullback of δ, and a cotangent for its input.
        """
        for swap in swaps:
            if swap == EXACT or not calls:
                yield self.exact
                continue
            for call in calls:
                call.swap = swap
            try:
                found = self._pull([call.x for call in calls], [call.change() for call in calls])
            finally:
                for call in calls:
                    call.swap = EXACT
            yield [_changed(g, [1.0], [delta]) for g, delta in zip(self.exact, found, strict=True)]

    def _pull(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> tuple[Tensor | None, ...]:
        """Return the parameters' gradients, None for those that the outputs do not depend on."""
        found = torch.autograd.grad(outputs, self.parameters, cotangents, retain_graph=True, allow_unused=True)
        return tuple(None if g is None else g.contiguous() for g in found)


def _changed(g: Tensor, c: Sequence[float], deltas: Sequence[Tensor | None]) -> Tensor:
    """Return g + Σ c·delta, g itself where that adds nothing."""
    for factor, delta in zip(c, deltas, strict=True):
        if factor and delta is not None:
            g = g.add(delta, alpha=factor)
    return g


class Graphs:
    """The gradients of the mean loss over several batches. One batch's graph is kept; of several, one is held at a time."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Loss, parameters: Sequence[Tensor], total: int):
        self.model, self.batches, self.loss, self.parameters, self.total = model, batches, loss, parameters, total
        self.only = self._made(batches[0]) if len(batches) == 1 else None

    def exact(self) -> Gradient:
        """Return the gradient with every norm's exact backward."""
        return reduce(add, (graph.exact for graph in self._each()))

    def swapped(self, sites: Collection[str], swaps: Sequence[Backward]) -> Iterator[Gradient]:
        """Yield for each swap the gradient with it at these sites, exact elsewhere."""
        if self.only is not None:
            return self.only.swapped(sites, swaps)
        found: list[Gradient] = []
        for graph in self._each():
            each = graph.swapped(sites, swaps)
            found = [add(sofar, more) for sofar, more in zip(found, each, strict=True)] if found else list(each)
        return iter(found)

    def _each(self) -> Iterator[Graph]:
        return iter([self.only]) if self.only is not None else map(self._made, self.batches)

    def _made(self, batch: Any) -> Graph:
        return Graph(self.model, batch, self.loss, self.parameters, self.total)


def add(one: Gradient, other: Gradient) -> Gradient:
    return [a + b for a, b in zip(one, other, strict=True)]
