"""What is captured is what ordinary hooks see, call for call, and the model behaves as if nobody looked."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lnjac.norms.capture import Capture, capture
from lnjac.norms.layers import Factors, Norm

D, T, B, VOCAB = 8, 5, 3, 11

MakeNorm = Callable[[], nn.Module]
NORMS: dict[str, MakeNorm] = {
    "nn.LayerNorm": lambda: nn.LayerNorm(D, eps=1e-3),
    "nn.LayerNorm without affine": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "nn.RMSNorm": lambda: nn.RMSNorm(D, eps=1e-4),
    "Norm": lambda: Norm(D, eps=1e-5),
    "rms Norm": lambda: Norm(D, eps=1e-5, rms=True),
}


class Block(nn.Module):
    def __init__(self, make: MakeNorm, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = make(), make()
        self.mix, self.fc, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        past = self.mix(self.ln_1(x)).cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        x = x + self.drop(past)
        return x + self.drop(self.proj(F.gelu(self.fc(self.ln_2(x)))))


class Tiny(nn.Module):
    """A transformer in all but its attention. checkpointed: None, or use_reentrant."""

    def __init__(self, make: MakeNorm, *, dropout: float = 0.0, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(Block(make, dropout) for _ in range(2))
        self.ln_f, self.head = make(), nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return self.head(self.ln_f(x))


class Tied(nn.Module):
    """One norm under two names, called before, twice in each of two steps, and after: six calls."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Linear(4, D)
        self.norm = nn.LayerNorm(D)
        self.alias = self.norm
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def step(self, x: Tensor) -> Tensor:
        x = x + self.a(self.norm(x))
        return x + self.b(torch.tanh(self.alias(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        for _ in range(2):
            x = self.step(x) if self.checkpointed is None else checkpoint(self.step, x, use_reentrant=self.checkpointed)
        return self.norm(x)


SITES = ["blocks.0.ln_1", "blocks.0.ln_2", "blocks.1.ln_1", "blocks.1.ln_2", "ln_f"]
REENTRANT = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def seeded(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, Norm)):
                for p in module.parameters():
                    p.add_(torch.randn_like(p) / 3)
    return model


def ids() -> Tensor:
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


def xent(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1).float(), batch.roll(-1, 1).flatten())


class Seen(NamedTuple):
    x: Tensor
    grad: Tensor | None


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Seen]]:
    """An independent account of every call, without checkpointing: inputs copied, outputs asked to keep their grad."""
    calls: list[tuple[Tensor, Tensor]] = []
    seen: list[Seen] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        calls.append((args[0].detach().clone(), output))

    handles = [
        m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm, Norm))
    ]
    yield seen
    seen += [Seen(x, output.grad) for x, output in calls]
    for handle in handles:
        handle.remove()


def same(found: list[Capture], expected: list[Seen]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.x, other.x), one.site
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), one.site


def hooks_of(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# what is captured


@pytest.mark.parametrize("kind", NORMS)
def test_captures_are_what_ordinary_hooks_see(kind: str) -> None:
    model = seeded(lambda: Tiny(NORMS[kind]))
    with watched(model) as expected:
        xent(model, ids()).backward()
    with capture(model) as found:
        xent(model, ids()).backward()
    same(found, expected)
    assert [c.site for c in found] == SITES
    assert {c.call for c in found} == {0}
    for c in found:
        module = model.get_submodule(c.site)
        assert (c.eps, c.rms) == (module.eps, "rms" in kind.lower())
        for part in ("weight", "bias"):
            theirs, ours = getattr(module, part, None), getattr(c, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and not ours.requires_grad)


@pytest.mark.parametrize("name", ["ste", "center"])
def test_a_surrogates_gradient_is_the_one_that_arrived(name: str) -> None:
    model = seeded(lambda: Tiny(NORMS["Norm"]))
    for module in model.modules():
        if isinstance(module, Norm):
            module.backward_rule = Factors(name, ["all"], name == "center", False, False)
    with watched(model) as expected:
        xent(model, ids()).backward()
    with capture(model) as found:
        xent(model, ids()).backward()
    same(found, expected)


def test_several_trailing_axes_are_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Linear(4, 2)))
    x = torch.randn(5, 6, 3, 4)
    with watched(model) as expected:
        model(x).square().sum().backward()
    with capture(model) as found:
        model(x).square().sum().backward()
    (one,), (other,) = found, expected
    assert other.grad is not None
    assert one.weight is not None
    assert one.x.shape == one.grad.shape == (5, 6, 12)
    assert one.weight.shape == (12,)
    assert torch.equal(one.x, other.x.flatten(-2))
    assert torch.equal(one.grad, other.grad.flatten(-2))
    assert torch.equal(one.weight, model[1].weight.flatten())


def test_a_norm_that_is_itself_the_model() -> None:
    norm = nn.LayerNorm(D)
    x = torch.randn(2, D)
    with capture(norm) as found:
        (norm(x) * x).sum().backward()
    assert torch.equal(found[0].grad, x)


def test_input_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self, norm: nn.Module, key: str) -> None:
            super().__init__()
            self.norm, self.key = norm, key

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(**{self.key: x})

    for norm, key in ((nn.LayerNorm(D), "input"), (nn.RMSNorm(D, eps=1e-5), "x"), (Norm(D, eps=1e-5), "x")):
        x = torch.randn(2, D)
        with capture(ByKeyword(norm, key)) as found:
            pass
        model = ByKeyword(norm, key)
        with capture(model) as found:
            (model(x) * x).sum().backward()
        assert torch.equal(found[0].x, x)
        assert torch.equal(found[0].grad, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_default_eps_of_rmsnorm_is_the_one_that_torch_uses(dtype: torch.dtype) -> None:
    """eps=None means the machine epsilon of the dtype that is computed in; it shows where mean(x²) is near it."""
    norm = nn.RMSNorm(4, elementwise_affine=False)
    x = torch.full((1, 4), 1e-3, dtype=dtype).requires_grad_()
    with capture(norm) as found:
        y = norm(x)
        y.sum().backward()
    n = x.detach().double() / (x.detach().double().square().mean(-1, keepdim=True) + found[0].eps).sqrt()
    torch.testing.assert_close(y.detach().double(), n, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_only_calls_whose_gradient_arrives_and_numbered_as_called() -> None:
    class SecondOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            self.norm(x)
            return self.norm(2 * x)

    model = SecondOnly()
    with capture(model) as found:
        model(torch.randn(2, D)).square().sum().backward()
    assert [(c.site, c.call) for c in found] == [("norm", 1)]


def test_in_place_operations_on_the_output_come_after_the_capture() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 2)

        def forward(self, x: Tensor, inplace: bool) -> Tensor:
            return self.head(F.relu(self.norm(self.fc(x)), inplace=inplace))

    model = seeded(InPlace)
    x = torch.randn(4, D)
    for frozen in (False, True):
        for module in (model.fc, model.norm):
            module.requires_grad_(not frozen)
        grads = []
        for inplace in (False, True):
            with capture(model) as found:
                model(x, inplace).square().sum().backward()
            grads.append(found[0].grad)
        assert torch.equal(*grads), f"frozen={frozen}"


def test_in_place_residual_does_not_change_the_captured_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x += self.fc(self.norm(x))
            return x

    model = InPlace()
    model.norm.requires_grad_(False)  # nothing below fc is trainable: torch allows it
    x = torch.randn(4, D)
    model(x).square().sum().backward()
    with capture(model) as found:
        model(x).square().sum().backward()
    assert torch.equal(found[0].x, x)


# the model is not disturbed


def everything(model: nn.Module, context: Any, *, autocast: bool = False) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Outputs, loss and every parameter's gradient within this context."""
    torch.manual_seed(3)
    model.zero_grad()
    outputs = []
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    with context, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = xent(model, ids())
        loss.backward()
    handle.remove()
    return outputs[0], loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def undisturbed(model: nn.Module, expected: int = 5, **more: Any) -> list[Capture]:
    out, loss, grads = everything(model, nullcontext(), **more)
    with capture(model) as found:
        out2, loss2, grads2 = everything(model, nullcontext(), **more)
    assert torch.equal(out, out2)
    assert torch.equal(loss, loss2)
    for a, b in zip(grads, grads2, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    assert len(found) == expected
    return found


@REENTRANT
@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_outputs_loss_and_gradients_are_bit_identical(kind: str, checkpointed: bool | None) -> None:
    undisturbed(seeded(lambda: Tiny(NORMS[kind], dropout=0.2, checkpointed=checkpointed)))


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_autocast(kind: str) -> None:
    model = seeded(lambda: Tiny(NORMS[kind]))
    found = undisturbed(model, autocast=True)
    with watched(model) as expected, torch.autocast("cpu", dtype=torch.bfloat16):
        xent(model, ids()).backward()
    same(found, expected)
    assert [c.x.dtype for c in found] == [s.x.dtype for s in expected]


def test_a_bfloat16_model() -> None:
    found = undisturbed(seeded(lambda: Tiny(NORMS["nn.LayerNorm"])).bfloat16())
    assert {c.x.dtype for c in found} == {c.grad.dtype for c in found} == {torch.bfloat16}


@pytest.mark.parametrize("kind", NORMS)
def test_some_parameters_frozen(kind: str) -> None:
    model = seeded(lambda: Tiny(NORMS[kind]))
    with watched(model) as expected:
        xent(model, ids()).backward()
    for part in (model.embed, model.blocks[0].ln_1, model.blocks[0].mix, model.ln_f):
        part.requires_grad_(False)
    same(undisturbed(model), expected)


@pytest.mark.parametrize("kind", NORMS)
def test_no_parameter_requires_grad(kind: str) -> None:
    model = seeded(lambda: Tiny(NORMS[kind]))
    with watched(model) as expected:
        loss = xent(model, ids())
        loss.backward()
    model.zero_grad()
    model.requires_grad_(False)
    with capture(model) as found:
        again = xent(model, ids())
        again.backward()
    same(found, expected)
    assert torch.equal(loss, again)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_evaluation_without_grad_inside_the_context_leaves_no_capture() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    plain = model(ids())
    with capture(model) as found, torch.no_grad():
        assert torch.equal(model(ids()), plain)
    assert found == []


# hooks


def test_hooks_are_removed() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    before = hooks_of(model)
    with capture(model) as found:
        assert hooks_of(model) > before
        xent(model, ids()).backward()
    assert hooks_of(model) == before
    xent(model, ids()).backward()
    assert len(found) == 5


def test_hooks_are_removed_after_an_exception() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))

    def broken(call: Capture) -> None:
        raise RuntimeError("reduce failed")

    for reduce, message in ((None, "loss failed"), (broken, "reduce failed")):
        with pytest.raises(RuntimeError, match=message), capture(model, reduce):  # noqa: PT012
            xent(model, ids()).backward()
            raise RuntimeError("loss failed")
        assert hooks_of(model) == 0


def test_a_backward_after_the_context_is_not_captured() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    arrived: list[Capture] = []
    with capture(model, arrived.append) as found:
        loss = xent(model, ids())
    loss.backward()
    assert arrived == found == []


def test_two_captures_at_once_agree() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with capture(model) as outer, capture(model) as inner:
            xent(model, ids()).backward()
        assert len(outer) == 5
        same(outer, [Seen(c.x, c.grad) for c in inner])
    assert hooks_of(model) == 0


@pytest.mark.parametrize("keep_loss", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_nothing_is_retained(reduced: bool, keep_loss: bool) -> None:
    """Not even while the loss lives on (a running total): its graph is spent, and must not hold the activations."""
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    refs: list[weakref.ref[Tensor]] = []

    def reduce(call: Capture) -> str:
        refs.extend((weakref.ref(call.x), weakref.ref(call.grad)))
        return call.site

    with capture(model, reduce if reduced else None) as found:
        loss = xent(model, ids())
        loss.backward()
    if not reduced:
        for call in found:
            refs += [weakref.ref(call.x), weakref.ref(call.grad)]
        del call
    del found
    if not keep_loss:
        del loss
    gc.collect()
    assert len(refs) == 10
    assert [ref() for ref in refs] == [None] * 10


def test_reduce_sees_each_call_once_as_its_gradient_arrives() -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    with capture(model) as whole:
        xent(model, ids()).backward()
    arrived = []

    def reduce(call: Capture) -> tuple[str, float]:
        arrived.append(call.site)
        return call.site, float(call.grad.norm())

    with capture(model, reduce) as found:
        xent(model, ids()).backward()
        assert arrived == SITES[::-1]
    assert found == [(c.site, float(c.grad.norm())) for c in whole]


# repeated modules and recomputation


@REENTRANT
@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_tied_norms_are_numbered_in_forward_order(checkpointed: bool | None) -> None:
    x = torch.randn(B, T, 4, generator=torch.Generator().manual_seed(2))
    model = seeded(Tied)
    with watched(model) as expected:
        model(x).square().sum().backward()
    model.checkpointed = checkpointed
    model.zero_grad()
    model(x).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    with capture(model) as found:
        model(x).square().sum().backward()
    same(found, expected)
    assert [(c.site, c.call) for c in found] == [("norm", i) for i in range(6)]
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


@REENTRANT
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_checkpointing_changes_no_capture(kind: str, checkpointed: bool) -> None:
    model = seeded(lambda: Tiny(NORMS[kind]))
    with watched(model) as expected:
        xent(model, ids()).backward()
    model.checkpointed = checkpointed
    with capture(model) as found:
        xent(model, ids()).backward()
    same(found, expected)
    assert [(c.site, c.call) for c in found] == [(site, 0) for site in SITES]


@REENTRANT
@pytest.mark.parametrize("checkpointed", [False, True])
def test_tied_norm_fed_twice_with_the_same_values(checkpointed: bool) -> None:
    """As at an initialisation whose residual branches are zero: the calls differ by their gradients alone."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)

        def forward(self, x: Tensor, factors: Tensor) -> Tensor:
            total = torch.zeros(())
            for factor in factors:
                branch = lambda x, factor=factor: self.norm(x) * factor  # noqa: E731
                total = total + checkpoint(branch, x, use_reentrant=checkpointed).sum()
            return total

    model = Twice()
    x = torch.randn(B, D, requires_grad=True)
    factors = torch.tensor([1.0, 2.0, 3.0])
    with capture(model) as found:
        model(x, factors).backward()
    assert [c.call for c in found] == [0, 1, 2]
    assert [float(c.grad[0, 0]) for c in found] == factors.tolist()


@REENTRANT
@pytest.mark.parametrize("checkpointed", [False, True])
def test_checkpointing_with_frozen_parameters(checkpointed: bool) -> None:
    model = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    with watched(model) as expected:
        xent(model, ids()).backward()
    model.checkpointed = checkpointed
    model.embed.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    model.embed.weight.requires_grad_(
        checkpointed
    )  # a reentrant checkpoint passes gradient only to inputs that need it
    same(undisturbed(model), expected)


# refusals


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="has no LayerNorm or RMSNorm"), capture(nn.Linear(2, 2)):
        pass


def compiled(how: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A model of which a part is compiled, and its loss."""
    model, loss = seeded(lambda: Tiny(NORMS["nn.LayerNorm"])), xent
    if how == "model":
        model = torch.compile(model, backend="eager")
    elif how == "block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a block's forward":
        model.blocks[0].forward = torch.compile(model.blocks[0].forward, backend="eager")
    else:
        loss = torch.compile(xent, backend="eager")
    return model, loss


@pytest.mark.parametrize("how", ["model", "block", "in place", "a block's forward", "loss"])
def test_a_compiled_part_runs_as_it_was_written_and_is_compiled_afterwards(how: str) -> None:
    """Hooks that are added after a compiled part's first call would not fire in it."""
    plain = seeded(lambda: Tiny(NORMS["nn.LayerNorm"]))
    with watched(plain) as expected:
        xent(plain, ids()).backward()
    model, loss = compiled(how)
    try:
        for _ in range(2):
            loss(model, ids()).backward()
        with capture(model) as found:
            loss(model, ids()).backward()
        frames = torch._dynamo.utils.counters["stats"]["calls_captured"]
        loss(model, ids()).backward()
        assert torch._dynamo.utils.counters["stats"]["calls_captured"] >= frames > 0
    finally:
        torch._dynamo.reset()
    assert [c.site for c in found] == SITES
    same(found, expected)
