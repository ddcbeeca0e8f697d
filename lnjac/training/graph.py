"""Forward and backward pass as one CUDA graph: a small update on a GPU is mostly time between launches of its kernels."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
Passes = Callable[[Batch], Tensor]
"""A forward and backward pass on a batch, which leaves gradients in `.grad` and returns the loss: ()."""


def captured(passes: Passes, batch: Batch, parameters: Iterable[nn.Parameter], device: torch.device) -> Passes:
    """Return `passes` as a replay of its kernels, or `passes` itself where there is no CUDA device or capture fails.

    batch: (idx, targets) of the shape and dtype of all that follow. The replay computes the same numbers by the same kernels,
    and draws the same random numbers.
    """
    if device.type != "cuda":
        return passes
    random = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    before = random.clone_state()
    try:
        return _Replay(passes, batch, list(parameters), device)
    except RuntimeError as error:  # say a part of one's own that looks at a value on the host
        torch.cuda.synchronize(device)
        random.graphsafe_set_state(before)  # the generator of a capture that failed draws no more
        log.warning("updates are launched kernel by kernel, not as a CUDA graph: %s", str(error).partition("\n")[0])
        return passes


@contextmanager
def _waiting_for_none() -> Iterator[None]:
    """Within the context what waits for the device raises RuntimeError: in a capture it would leave torch's allocator and
    generator in a capture's state."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Replay:
    def __init__(self, passes: Passes, batch: Batch, parameters: list[nn.Parameter], device: torch.device) -> None:
        idx, targets = batch
        self.batch = (idx.to(device, copy=True), targets.to(device, copy=True))
        random = torch.cuda.get_rng_state(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # libraries set themselves up in the first passes, which no graph may hold
            passes(self.batch)
            with _waiting_for_none():
                passes(self.batch)
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.set_rng_state(random, device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = passes(self.batch)
        self.grads = [(parameter, parameter.grad) for parameter in parameters]

    def __call__(self, batch: Batch) -> Tensor:
        for mine, new in zip(self.batch, batch, strict=True):
            mine.copy_(new, non_blocking=True)
        self.graph.replay()
        for parameter, grad in self.grads:  # a measurement may have put others in their place
            parameter.grad = grad
        return self.loss
