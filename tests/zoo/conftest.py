"""What the zoo's tests share: no network, and a torchvision that can be imported beside any build of torch."""

import contextlib
import os
from typing import Any

import torch
from support.walking import table

os.environ["HF_HUB_OFFLINE"] = "1"


def declare_operators() -> None:
    """Declare the two operators without which torchvision cannot be imported where its compiled part does not load.

    The package index has torchvision built for CUDA, which does not load beside a CPU build of torch. The models of the
    zoo use none of its compiled operators, but timm and transformers import it.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


with contextlib.suppress(ModuleNotFoundError):  # without the extra each test module skips, and names it
    declare_operators()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the zoo's table as Markdown."""
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"]
    rows = [value for report in reports for name, value in report.user_properties if name == "zoo"]
    if rows:
        terminalreporter.section("the zoo")
        terminalreporter.write_line(table(sorted(rows)))
