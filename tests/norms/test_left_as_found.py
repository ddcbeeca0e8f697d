"""The model is left as it was found, and what cannot be measured is named, in one line or by the coverage."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.loops import (
    CLASSES,
    SITES,
    D,
    OwnRMSNorm,
    Plain,
    T,
    assert_row,
    assert_rows_equal,
    batch,
    loss,
    net,
    vectors,
)
from torch import Tensor, nn

from lnjac.norms.capture import Capture, capture
from lnjac.norms.probe import Probe, probe

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def states(measuring: Probe) -> dict[str, str]:
    found: dict[str, str] = measuring.coverage().set_index("site")["state"].to_dict()
    return found


class Counting(nn.Module):
    """Holds a buffer that its forward replaces by another tensor, and one that it changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("changed", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.changed += 1
        return x


class Trained(nn.Module):
    """A model whose train mode draws random numbers and moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.batch_norm, self.drop = nn.Linear(4, D), nn.BatchNorm1d(T), nn.Dropout(0.5)
        self.counting, self.norm, self.own = Counting(), nn.LayerNorm(D), DroppedNorm(D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.counting(self.drop(self.batch_norm(self.fc(x))))
        out: Tensor = self.head(self.own(self.norm(h)))
        return out


class DroppedNorm(nn.LayerNorm):
    """Drops entries of what it normalises: no norm, and another each time that it is run."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def everything(model: nn.Module) -> dict[str, Any]:
    """What a measurement might change, by name."""
    found: dict[str, Any] = {f"state {name}": t.clone() for name, t in model.state_dict().items()}
    found |= {f"identity {name}": id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, p in model.named_parameters():
        found |= {f"grad {name}": None if p.grad is None else p.grad.clone(), f"identity of grad {name}": id(p.grad)}
    for name, module in model.named_modules():
        found[f"training {name}"] = module.training
        found[f"hooks {name}"] = [len(getattr(module, kind)) for kind in HOOKS]
        found[f"attributes {name}"] = sorted(vars(module))
    for name, p in model.named_parameters():
        found[f"requires_grad {name}"] = p.requires_grad
        found[f"hooks of {name}"] = (
            len(p._backward_hooks or {}),
            len(getattr(p, "_post_accumulate_grad_hooks", None) or {}),
        )
    found["generator"] = torch.get_rng_state()
    return found


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name


def trained() -> Trained:
    torch.manual_seed(0)
    model = Trained().double()
    model.fc.eval()  # a flag unlike the others'
    model.head.weight.requires_grad_(False)
    model.fc.weight.register_hook(lambda grad: 2 * grad)
    model.fc.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 2 * p.grad))
    loss(model, batch())[0].backward()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_measure_leaves_the_model_as_it_was(fails: bool) -> None:
    model = trained()
    measuring = probe(model)
    before = everything(model)

    def failing(model: nn.Module, one: Any) -> tuple[Tensor, int]:
        loss(model, one)[0].backward()
        raise ArithmeticError("the loss failed")

    if fails:
        with pytest.raises(ArithmeticError, match="the loss failed"):
            measuring.measure([batch()], failing)
    else:
        measuring.measure([batch(), batch(4)], loss)
        assert states(measuring) == {
            "norm": "measured",
            "own": "functional call",
            "own.layer_norm_0": "functional call",
            "batch_norm": "other kind of norm",
        }
    assert_same(everything(model), before)


def test_measure_in_train_mode_measures_train_mode() -> None:
    """So that the law above is not satisfied by a switch to eval mode: the draws are those that training would make."""
    model = trained()
    measured = probe(model).measure([batch()], loss)
    mean, _ = loss(model, batch())
    assert measured["loss_nats"][0] == pytest.approx(mean.item(), rel=1e-12)
    assert loss(model.eval(), batch())[0].item() != pytest.approx(mean.item(), rel=1e-3)


def test_watch_disturbs_no_update() -> None:
    """Neither outputs, gradients, buffers nor random draws differ from those of an unwatched step."""
    ends = []
    for watched in (False, True):
        model = trained()
        measuring = probe(model)
        if watched:
            with measuring.watch() as seen:
                mean, tokens = loss(model, batch())
                seen.tokens(tokens)
                mean.backward()
        else:
            loss(model, batch())[0].backward()
        found = everything(model)
        ends.append({name: value for name, value in found.items() if "identity" not in name})
    assert_same(*ends)


def test_watch_leaves_no_hook_after_an_exception() -> None:
    model = net()
    with pytest.raises(ArithmeticError), probe(model).watch():
        raise ArithmeticError
    assert not any(getattr(module, kind) for module in model.modules() for kind in HOOKS)
    assert torch.overrides._get_current_function_mode_stack() == []


# inputs and parameters


class InPlace(nn.Module):
    """Adds to a norm's input after the norm, as a residual stream written with += does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.fc, self.head = nn.Linear(4, D), norm, nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) * 1
        h += self.fc(self.norm(h))
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize(
    ("how", "device"),
    [
        ("own", "cpu"),
        ("own under autocast", "cpu"),
        pytest.param("autocast", "cuda", marks=GPU),  # on a CPU autocast leaves nn.LayerNorm in bfloat16
    ],
)
def test_an_input_changed_in_place_is_measured_from_what_it_was(how: str, device: str) -> None:
    torch.manual_seed(0)
    autocast = "autocast" in how
    model = InPlace(nn.LayerNorm(D) if how == "autocast" else OwnRMSNorm(D))
    model = model.to(device, torch.float32 if autocast else torch.bfloat16)
    x, targets = (t.to(device) for t in batch(dtype=torch.float32))
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()
        seen.update(x=args[0].detach().clone(), y=y, alias=args[0])

    model.norm.register_forward_hook(keep)
    measuring = probe(model)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast), measuring.watch() as one:
        mean, tokens = loss(model, (x if autocast else x.bfloat16(), targets))
        one.tokens(tokens, mean)
        mean.backward()
    assert not torch.equal(seen["alias"], seen["x"])  # it did change
    rms = how != "autocast"
    true = vectors(seen["x"], seen["y"].grad.double() * tokens, model.norm.weight.double(), 1e-5, rms=rms)
    assert_row(measuring.rows().iloc[0], true, rel=1e-5)


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own RMSNorm", "functional"])
def test_functional_call_is_measured_with_the_parameters_given(kind: str) -> None:
    model = net(kind)
    torch.manual_seed(5)
    other = {name: p.detach() + torch.randn_like(p) / 2 for name, p in model.named_parameters()}
    replaced = net(kind)
    replaced.load_state_dict(other)
    expected = probe(replaced).measure([batch()], loss)

    def called(model: nn.Module, one: Any) -> tuple[Tensor, int]:
        return loss(lambda x: torch.func.functional_call(model, other, (x,)), one)  # type: ignore[arg-type]

    assert_rows_equal(probe(model).measure([batch()], called), expected, rel=1e-9)
    stored = probe(model).measure([batch()], loss)
    assert (stored["radial_share"] / expected["radial_share"] - 1).abs().min() > 1e-3


# tokens that are not there, or do not count


class Experts(nn.Module):
    """Sends each token to an expert of two by its first entry's sign."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.experts, self.head = (
            nn.Linear(4, D),
            nn.ModuleList(norm() for _ in range(2)),
            nn.Linear(D, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = self.embed(x), x[..., 0] > 0
        y = torch.zeros_like(h)
        for expert, mine in zip(self.experts, (chosen, ~chosen), strict=True):
            y[mine] = expert(h[mine])
        out: Tensor = self.head(y)
        return out


class Calling(nn.Module):
    """Calls the function, under a name that is no norm's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(D), lambda: OwnRMSNorm(D), Calling])
def test_an_expert_without_tokens_is_left_out_and_named(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, (x, targets) = Experts(norm).double(), batch()
    measuring = probe(model)
    positive = torch.cat([x[..., :1].abs(), x[..., 1:]], -1)
    name = "experts.{}.layer_norm_0" if norm is Calling else "experts.{}"
    table = measuring.measure([(positive, targets)], loss)
    assert table["site"].tolist() == [name.format(0)]
    assert table["n_tokens"].tolist() == [40]
    assert states(measuring)[name.format(1)] == "no tokens"
    both = measuring.measure([(positive, targets), (x, targets)], loss)
    assert both.set_index("site")["n_tokens"].sum() == 80
    assert states(measuring)[name.format(1)] in ("measured", "functional call")


def test_targets_that_are_all_ignored_are_refused_in_one_line() -> None:
    x, targets = batch()
    with pytest.raises(ValueError, match=r"^the loss is the mean of 0 tokens: leave out a batch .*$"):
        probe(net()).measure([(x, torch.full_like(targets, -100))], loss)


def masked(model: nn.Module, one: Any) -> tuple[Tensor, int]:
    x, targets, mask = one
    return F.cross_entropy(model(x)[mask], targets[mask]), int(mask.sum())


class Tokenwise(nn.Module):
    """A network in which no token sees another, so that padded ones can be taken out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ln_1, self.fc = nn.Linear(4, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.ln_f, self.head = OwnRMSNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.head(self.ln_f(x + self.fc(self.ln_1(x))))
        return out


def tokenwise() -> Tokenwise:
    torch.manual_seed(0)
    return Tokenwise().double()


def test_padded_tokens_masked_out_are_as_if_not_there() -> None:
    x, targets = batch()
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 2, 5, 4, 1, 2])[:, None]
    x = torch.where(mask[..., None], x, 100.0)
    found = probe(tokenwise()).measure([(x, targets, mask)], masked, mask=lambda one: one[2])
    expected = probe(tokenwise()).measure([(x[mask][None], targets[mask][None])], loss)
    assert_rows_equal(found, expected)
    unmasked = probe(tokenwise()).measure([(x, targets, mask)], masked)
    assert set(unmasked["n_tokens"]) == {40}
    assert (unmasked["sigma_mean"] > 2 * expected["sigma_mean"]).all()


def test_a_mask_of_another_shape_than_every_norms_is_refused() -> None:
    x, targets = batch()
    mask = torch.ones(8, T + 1, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"^the mask of shape \(8, 6\) fits no norm, whose inputs are of \(8, 5\) tokens"
    ):
        probe(net()).measure([(x, targets)], loss, mask=lambda _: mask)


def test_a_mask_told_after_the_backward_pass_is_refused() -> None:
    measuring = probe(net())
    with pytest.raises(ValueError, match="a mask came after the backward pass"), measuring.watch() as seen:  # noqa: PT012
        mean, tokens = loss(measuring.model, batch())
        mean.backward()
        seen.tokens(tokens, mask=torch.ones(8, T, dtype=torch.bool))


def test_tokens_that_are_not_finite_are_counted_named_and_left_out() -> None:
    """An inf in one token's gradient, a NaN in another's input."""
    x, targets = batch()
    x[2, 3] = math.nan

    def broken(model: nn.Module, one: Any) -> tuple[Tensor, int]:
        logits = model(one[0])
        each = F.cross_entropy(logits.flatten(0, 1), one[1].flatten(), reduction="none").view(8, T)
        weight = torch.ones(8, T, dtype=torch.float64)
        weight[4, 1] = math.inf
        return (weight * each).sum() / 40, 40

    measuring = probe(tokenwise())
    with pytest.warns(UserWarning, match="tokens that are not finite are left out: ln_1 2, ln_f 2"):
        found = measuring.measure([(x, targets)], broken)
    assert found["n_nonfinite"].tolist() == [2, 2]
    assert found["n_tokens"].tolist() == [38, 38]
    kept = torch.ones(8, T, dtype=torch.bool)
    kept[2, 3] = kept[4, 1] = False
    expected = probe(tokenwise()).measure([(x[kept][None], targets[kept][None])], loss)
    assert_rows_equal(
        found.drop(columns=["n_nonfinite", "loss_nats"]), expected.drop(columns=["n_nonfinite", "loss_nats"])
    )
    assert states(measuring) == {"ln_1": "measured", "ln_f": "measured"}


def test_a_site_with_nothing_finite_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.good(x).square().mean() + 0 * self.bad(x * math.nan).nan_to_num().sum()

    def halved(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x), 3

    model, x = Half().double(), torch.randn(3, 4, dtype=torch.float64)
    measuring = probe(model)
    with pytest.warns(UserWarning, match="tokens that are not finite are left out: bad all"):
        table = measuring.measure([x], halved)
    assert table["site"].tolist() == ["good"]
    assert states(measuring) == {"good": "measured", "bad": "not finite"}
    with pytest.warns(UserWarning, match="are left out: good all, bad all"):  # a run that diverges goes on
        empty = measuring.measure([x * math.nan], halved)
    assert (len(empty), list(empty)) == (0, list(table))


def test_a_micro_batch_with_nothing_finite_is_counted() -> None:
    x, targets = batch()
    measuring = probe(tokenwise())
    with pytest.warns(UserWarning, match="left out: ln_1 20, ln_f 20"):
        found = measuring.measure([(x[:4], targets[:4]), (x[4:] * math.inf, targets[4:])], loss)
    assert found["n_tokens"].tolist() == [20, 20]
    assert found["n_nonfinite"].tolist() == [20, 20]
    assert states(measuring) == {"ln_1": "measured", "ln_f": "measured"}
    expected = probe(tokenwise()).measure([(x[:4], targets[:4])], loss)
    columns = ["n_nonfinite", "loss_nats"]
    assert_rows_equal(found.drop(columns=columns), expected.drop(columns=columns))


# what a backward pass cannot tell


@pytest.mark.parametrize("how", ["grad", "vmap", "vmap of grad", "ensemble"])
@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own RMSNorm", "functional"])
def test_torch_func_is_refused_by_the_sites_name(kind: str, how: str) -> None:
    model, (x, targets) = net(kind), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters: dict[str, Tensor], x: Tensor, targets: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return F.cross_entropy(logits[0], targets)

    def called(model: nn.Module, one_batch: Any) -> tuple[Tensor, int]:
        if how == "grad":
            torch.func.grad(one)(parameters, x[0], targets[0])
        elif how == "vmap":
            return torch.func.vmap(one, (None, 0, 0))(dict(model.named_parameters()), x, targets).mean(), 40
        elif how == "ensemble":
            two = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
            return torch.func.vmap(one, (0, None, None))(two, x[0], targets[0]).mean(), 40
        else:
            torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, targets)
        return loss(model, one_batch)

    first = "blocks.0.layer_norm_0" if kind == "functional" else "blocks.0.ln"
    with pytest.raises(ValueError, match=rf"^{re.escape(first)} is run by torch.func \(vmap, grad\).*$"):
        probe(model).measure([batch()], called)


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own RMSNorm", "functional"])
def test_a_second_backward_pass_is_refused_in_one_line(kind: str) -> None:
    def penalised(model: nn.Module, one: Any) -> tuple[Tensor, int]:
        x = one[0].clone().requires_grad_()
        mean, tokens = loss(model, (x, one[1]))
        (slope,) = torch.autograd.grad(mean, x, create_graph=True)
        return mean + slope.square().sum(), tokens

    with pytest.raises(
        ValueError, match=r"^a second gradient arrived at \S+: make one backward pass in each context.*$"
    ):
        probe(net(kind)).measure([batch()], penalised)


class Various(nn.Module):
    """Norms that no gradient reaches, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, D), nn.Linear(D, CLASSES)
        self.used, self.frozen, self.unused, self.never = (nn.LayerNorm(D) for _ in range(4))
        self.group, self.plain, self.mine = nn.GroupNorm(1, T), Plain(D), LayerNorm(D, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.used(self.embed(x))
        with torch.no_grad():
            h = h + self.frozen(h)
            h = h + F.layer_norm(h, (D,))
        self.unused(h)
        h = h + self.mine(F.layer_norm(self.group(self.used(h)), (D,), self.plain.weight, self.plain.bias))
        out: Tensor = self.head(h)
        return out


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, of no class of torch's, as small GPT code bases have it."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(ndim)), nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


def test_the_coverage_names_each_norm_and_function() -> None:
    torch.manual_seed(0)

    def after(model: nn.Module, one: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(F.layer_norm(model(one[0]), (CLASSES,)).flatten(0, 1), one[1].flatten()), 40

    measuring = probe(Various().double())
    table = measuring.measure([batch()], after)
    assert [*zip(table["site"], table["call"], strict=True)] == [
        ("used", 1), ("layer_norm_1", 0), ("mine", 0), ("layer_norm", 0)
    ]  # fmt: skip
    assert (
        states(measuring)
        == table.attrs["coverage"]
        == {
            "used": "measured",
            "frozen": "no gradient",
            "unused": "no gradient",
            "never": "never called",
            "mine": "measured",
            "group": "other kind of norm",
            "layer_norm_0": "no gradient",
            "layer_norm_1": "functional call",
            "layer_norm": "functional call",
        }
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_small_gpts_own_layer_norm_is_measured(bias: bool) -> None:
    model, twin = net(), net()
    for block, plain in zip(model.blocks, twin.blocks, strict=True):
        own = LayerNorm(D, bias).double()
        own.load_state_dict({"weight": plain.ln.weight, **({"bias": plain.ln.bias} if bias else {})})
        block.ln = own
        if not bias:
            nn.init.zeros_(plain.ln.bias)
    assert_rows_equal(probe(model).measure([batch()], loss), probe(twin).measure([batch()], loss), rel=1e-9)


# bounded memory


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "own RMSNorm", "functional"])
def test_max_tokens_bounds_what_is_kept_and_keeps_the_rows_close(kind: str) -> None:
    model, one = net(kind), batch(200)
    sizes: list[tuple[int, ...]] = []

    def reduce(call: Capture) -> None:
        sizes.append((call.x.untyped_storage().nbytes() // call.x.element_size(), *call.x.shape, *call.grad.shape))

    with capture(model, reduce, max_tokens=100):
        loss(model, one)[0].backward()
    assert sizes == [(100 * D, 100, D, 100, D)] * 3
    whole, some = (probe(model, max_tokens=n).measure([one], loss).set_index("site") for n in (None, 400))
    assert set(some["n_tokens"]) == {400}
    for name in ("radial_share", "share_kept", "cos_center_vs_true", "sigma_mean", "flat_cos_ste"):
        assert some[name].tolist() == pytest.approx(whole[name].tolist(), rel=0.25), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rows_equal(probe(model, max_tokens=1000).measure([one], loss).set_index("site"), whole, rel=1e-12)


def test_max_tokens_takes_the_tokens_evenly() -> None:
    model, (x, targets) = tokenwise(), batch()
    x, targets = x.reshape(1, 40, 4), targets.reshape(1, 40)
    every = torch.linspace(0, 39, 14).round().long()
    found = probe(model, max_tokens=14).measure([(x, targets)], loss)
    one = (x[:, every], targets[:, every])
    expected = probe(model).measure([one], lambda model, one: (loss(model, one)[0] * 14 / 40, 40))
    columns = ["loss_nats"]
    assert_rows_equal(found.drop(columns=columns), expected.drop(columns=columns))


@pytest.mark.parametrize("at", SITES)
def test_the_whole_graph_may_be_watched_twice_at_once(at: str) -> None:
    """Two probes in one pass see the same."""
    model = net()
    one, other = probe(model), probe(model)
    with one.watch() as a, other.watch() as b:
        mean, tokens = loss(model, batch())
        a.tokens(tokens)
        b.tokens(tokens)
        mean.backward()
    assert one.rows().set_index("site").loc[at].equals(other.rows().set_index("site").loc[at])
