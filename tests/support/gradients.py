"""What tests of credit assignment share: small models in float64, their gradients, feedback, and how these are compared."""

import torch
from support.trained import BLOCK, VOCAB, config_of, tokens
from torch import Tensor, nn

from lnjac.config.schema import check
from lnjac.gpt import credit
from lnjac.gpt import model as gpt

METHODS = ("bp", "fa", "usf", "frsf", "brsf", "kp", "frozen", "dfa")
LAYERWISE = ("fa", "usf", "frsf", "brsf", "kp")
SIGNED = ("usf", "frsf", "brsf")


def build(*overrides: str) -> gpt.GPT:
    return gpt.build(config_of(*overrides), VOCAB)


IDX, TARGETS = tokens(3, BLOCK), tokens(3, BLOCK, seed=1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The loss's gradients by name, feedback left out; they are taken anew."""
    model.zero_grad()
    model(IDX, TARGETS)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "feedback" not in name}


def matrices(model: nn.Module) -> dict[str, credit.FeedbackLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, credit.FeedbackLinear)}


KIND = {"attn.qkv": "qkv", "attn.proj": "attn_proj", "mlp.fc": "fc", "mlp.proj": "mlp_proj", "head": "head"}

IN_A_BLOCK = ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc", "mlp.proj")


def kind_of(name: str) -> str:
    return KIND[name.rpartition("blocks.")[2].partition(".")[2] or name]


def policy(**kinds: str) -> list[str]:
    return [f"method.policy.{kind}={kinds.get(kind, 'true')}" for kind in KIND.values()]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol * 1e-3, msg=name)


def feedback(model: nn.Module) -> dict[str, Tensor]:
    """What is stored with the run: every feedback matrix in its state_dict."""
    return {name: t.clone() for name, t in model.state_dict().items() if "feedback" in name}


def problems(*overrides: str) -> list[str]:
    return check(config_of(*overrides))
