"""Run by torchrun, in each of two processes: watch and measure a model that both train; write what each found.

python -m torch.distributed.run --nproc_per_node 2 tests/support/ranked.py FOLDER
"""

import sys
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from support.loops import Batch, Block, batch, halves, loss, net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lnjac.norms.probe import probe


class Routed(nn.Module):
    """Each process calls an expert of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.experts = net(), nn.ModuleList(nn.LayerNorm(7, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[dist.get_rank()](self.net(x)) + 0 * sum(p.sum() for p in self.experts.parameters())
        return out


def ddp(kind: str) -> nn.Module:
    return DistributedDataParallel(net(kind))


def fsdp(kind: str) -> nn.Module:
    model = net(kind)
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()

    def keep(name: str, table: pd.DataFrame) -> None:
        table.to_pickle(folder / f"{name}.{rank}")

    mine: Batch = halves(batch())[rank]
    for way, wrapped in (("ddp", ddp), ("fsdp", fsdp)):
        for kind in ("nn.LayerNorm", "own RMSNorm", "functional"):
            model = wrapped(kind)
            measuring = probe(model)
            for k in (1, 2):
                for one in halves(mine, k):
                    with measuring.watch(step=k) as seen:
                        mean, tokens = loss(model, one)
                        seen.tokens(tokens, mean)
                        (mean / k).backward()
                keep(f"{way} {kind} {k}", measuring.rows(k))
            alone = probe(model, distributed=False)
            keep(f"{way} {kind} measured", measuring.measure(halves(mine), loss))
            keep(f"{way} {kind} alone", alone.measure([mine], loss))
            if kind == "nn.LayerNorm":  # training goes on
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                optimizer.step()
                keep(f"{way} stepped", measuring.measure([mine], loss))
    keep("routed", probe(DistributedDataParallel(Routed())).measure([mine], loss))
    if rank == 1:
        keep("on one rank", probe(net(), distributed=False).measure([mine], loss))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
