"""Train a small character GPT by a plain loop; lnjac measures its norms, records its runs and sweeps them.

python examples/nanogpt/train.py
python examples/nanogpt/train.py -m attention=softmax,sigmoid seed=1,2,3
lnjac compare multirun/nanogpt --by attention
"""

import math
import random
from contextlib import nullcontext
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import lnjac

execution = ["device"]  # keys that change no number: lnjac leaves them out of a run's identity


def check(cfg: DictConfig) -> list[str]:
    """Return a line for each problem of a config: lnjac calls this for every job before any starts."""
    problems = []
    if cfg.attention not in ("softmax", "sigmoid"):
        problems.append(f"attention={cfg.attention}: choose softmax or sigmoid")
    if cfg.width % cfg.heads:
        problems.append(f"width={cfg.width} is no multiple of heads={cfg.heads}: choose another width")
    if cfg.text is not None and not Path(cfg.text).is_file():
        problems.append(f"text={cfg.text} is no file: give the path of a text, or text=null")
    return problems


class LayerNorm(nn.Module):
    """A LayerNorm whose bias is optional, by torch's function."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.heads, self.mode = cfg.heads, cfg.attention
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=cfg.bias)
        self.out = nn.Linear(cfg.width, cfg.width, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        if self.mode == "softmax":
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
        else:  # each weight by itself, smaller in longer contexts
            weights = torch.sigmoid(scores - math.log(time)).masked_fill(later, 0)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(cfg.width, cfg.bias), LayerNorm(cfg.width, cfg.bias)
        self.attn = Attention(cfg)
        self.up = nn.Linear(cfg.width, 4 * cfg.width, bias=cfg.bias)
        self.down = nn.Linear(4 * cfg.width, cfg.width, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, cfg: DictConfig, letters: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(letters, cfg.width), nn.Embedding(cfg.context, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.ln_f = LayerNorm(cfg.width, cfg.bias)
        self.lm_head = nn.Linear(cfg.width, letters, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.layers) if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def corpus(path: str | None) -> tuple[Tensor, int]:
    """Return a text as numbers of its characters, and how many characters there are."""
    if path is not None:
        text = Path(path).read_text()
    else:  # sentences in which the ending of the subject returns in its verb
        draw, stems = (
            random.Random(0),
            {"a": ["mor", "tel", "vin"], "o": ["kas", "lum", "pir"], "i": ["ned", "sul", "fat"]},
        )
        every, sentences = [stem for kind in stems.values() for stem in kind], []
        for _ in range(12_000):
            ending = draw.choice("aoi")
            subject, verb, other = draw.choice(stems[ending]), draw.choice(["ber", "dun", "gol"]), draw.choice(every)
            sentences.append(f"{subject}{ending} {verb}{ending} {other}. ")
        text = "".join(sentences)
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    return torch.tensor([index[letter] for letter in text]), len(letters)


def loss(model: nn.Module, windows: Tensor) -> tuple[Tensor, int]:
    """Return the mean loss of predicting each next character, and of how many: windows (B, T + 1)."""
    targets = windows[:, 1:]
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), targets.flatten()), targets.numel()


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, cfg: DictConfig) -> float:
    """Return the mean loss over windows of the text that do not overlap."""
    windows = text.unfold(0, cfg.context + 1, cfg.context)
    parts = [loss(model, part.to(cfg.device)) for part in windows.split(64)]
    return sum(float(mean) * n for mean, n in parts) / sum(n for _, n in parts)


def rate(step: int, cfg: DictConfig) -> float:
    """Return the learning rate of an update: a linear warm-up, then half a cosine down to a tenth."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    left = 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))
    return cfg.lr * (0.1 + 0.9 * left)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    text, letters = corpus(cfg.text)
    train, val = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = GPT(cfg, letters).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    probe = lnjac.probe(model)
    with lnjac.record() as run:
        for step in range(cfg.steps + 1):
            starts = torch.randint(len(train) - cfg.context, (cfg.batch, 1))
            windows = train[starts + torch.arange(cfg.context + 1)].to(cfg.device)
            measured = step % cfg.measure_every == 0 or step == cfg.steps
            with probe.watch(step) if measured else nullcontext() as seen:
                mean, tokens = loss(model, windows)
                if seen is not None:
                    seen.tokens(tokens, mean)
                optimizer.zero_grad()
                mean.backward()
            if measured:
                run.layers(probe.rows(step), step)
            if step == cfg.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(step, cfg)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            run.scalars(step + 1, train_loss=mean.item(), lr=rate(step, cfg))
        run.scalars(cfg.steps, val_loss=validate(model, val, cfg))


if __name__ == "__main__":
    main()
