"""Train a tiny Llama with center_scale at its last norm and with the exact backward; print what center_scale costs.

python examples/tiny_llama.py runs/tiny_llama
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lnjac

VOCABULARY, LENGTH, BATCH = 64, 64, 16
SITE = "model.norm"
SEEDS = (1, 2, 3)
UPDATES = 60


def transitions() -> Tensor:
    """Return the probability of each token (column) after each (row), a few of them likely: (VOCABULARY, VOCABULARY)."""
    logits = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return logits.softmax(-1)


def sequences(language: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n sequences of the language: (n, LENGTH)."""
    ids = torch.randint(VOCABULARY, (n, 1), generator=generator)
    for _ in range(LENGTH - 1):
        ids = torch.cat([ids, torch.multinomial(language[ids[:, -1]], 1, generator=generator)], dim=1)
    return ids


def entropy(language: Tensor) -> float:
    """Return the least mean loss that a model can have, in nats per token."""
    often = torch.linalg.matrix_power(language.double(), 1000)[0]
    return float(-(often @ (language * language.log()).sum(-1).double()))


def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    mean: Tensor = model(input_ids=ids, labels=ids).loss
    return mean, ids[:, 1:].numel()


def train(folder: Path, backward: str, seed: int, updates: int) -> None:
    """Train one run. Runs of one seed share their initial weights and batches."""
    config: dict[str, Any] = {"ln_backward": backward, "sites": SITE, "lr": 3e-3, "updates": updates}
    language = transitions()
    held_out = sequences(language, 64, torch.Generator().manual_seed(10_000))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    with lnjac.record(folder, config=config, seed=seed) as run, lnjac.set_backward(model, backward, sites=SITE):
        if run.found:
            return
        for step in range(1, updates + 1):
            optimizer.zero_grad()
            mean, _ = loss(model, sequences(language, BATCH, generator))
            mean.backward()
            optimizer.step()
            run.scalars(step, train_loss=float(mean.detach()))
        table = lnjac.probe(model).measure([held_out], loss)
        run.layers(table, updates)
        run.scalars(updates, val_loss=table["loss_nats"][0])


def main(folder: Path, updates: int = UPDATES) -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread would mostly wait
    for seed in SEEDS:
        for backward in ("exact", "center_scale"):
            train(folder / f"{backward}-seed{seed}", backward, seed, updates)
    lnjac.merge(folder, folder / "all.parquet")
    cost = lnjac.cost(folder / "all.parquet").costs.rows.iloc[0]
    print(
        f"lowest possible loss {entropy(transitions()):.3f}, of a uniform guess {torch.tensor(VOCABULARY).log():.3f} nats"
    )
    print(f"loss with {cost['a']} {cost['mean_a']:.4f}, with {cost['b']} {cost['mean_b']:.4f}")
    print(f"cost {cost['difference']:+.4f} nats, 95% interval {cost['low']:.4f} to {cost['high']:.4f}, n = {cost['n']}")
    clear = cost["low"] > 0 or cost["high"] < 0
    print("the interval leaves out zero" if clear else "the interval contains zero: no cost is shown")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny_llama"))
