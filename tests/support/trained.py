"""Small models in float64, composed quickly, trained a few updates or perturbed."""

import functools
import math

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lnjac.config import identity, schema
from lnjac.config.compose import compose
from lnjac.config.schema import RunConfig
from lnjac.data.corpus import Corpus
from lnjac.training.loop import Training

VOCAB, N_LAYER, D, BLOCK = 11, 2, 16, 8


TINY = ("model=tiny", f"model.n_embd={D}", f"model.block_size={BLOCK}", "precision=fp64", "batch_size=4", "seed=5")


@functools.cache
def _composed(groups: tuple[str, ...]) -> RunConfig:
    return compose(*TINY, *groups)


def config_of(*overrides: str) -> RunConfig:
    """compose(*TINY, *overrides), quicker: Hydra runs once per choice of groups, dotted values are merged in afterwards."""
    groups = tuple(o for o in overrides if o.startswith(("method=", "optimizer=", "attn_mode=", "ln_backward=")))
    rest = OmegaConf.from_dotlist([o for o in overrides if o not in groups])
    return schema.build(OmegaConf.merge(OmegaConf.create(identity.to_dict(_composed(groups))), rest))


@functools.cache
def corpus() -> Corpus:
    train, val = (np.random.default_rng(s).integers(0, VOCAB, 400).astype(np.uint16) for s in (0, 1))
    return Corpus("noise", train, val, VOCAB, "0" * 64, None)


def trained(config: RunConfig, updates: int) -> Training:
    """The run after some updates."""
    training = Training(config, corpus())
    for _ in range(updates):
        assert math.isfinite(training.update())
    return training


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def perturb(model: nn.Module) -> nn.Module:
    """Move every parameter but kp's feedback, by draws of its name alone, so that no error is near zero."""
    for name, p in model.named_parameters():
        if "feedback" not in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return model
