"""Raise an error where only an expression may stand."""

from typing import Any


def raise_(error: BaseException) -> Any:
    raise error
