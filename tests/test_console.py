"""Output that cannot be encoded, and output that nobody reads."""

import io
import subprocess
import sys

import pytest

from lnjac import console

HELLO = "from lnjac import console; console.steady(); import sys; "


def said(text: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        console.steady()
        print(text, end="")
        sys.stdout.flush()
        return raw.getvalue()


def test_what_cannot_be_encoded_is_spelled_out_and_signs_stay_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "σ_μ  −0.5 ≤ Δ … café ‖g‖ \N{SNOWMAN}"
    assert said(text, "ascii", monkeypatch) == b"sigma_mu  -0.5 <= delta ... caf\\xe9 \\u2016g\\u2016 \\u2603"
    assert said(text, "cp1253", monkeypatch).decode("cp1253") == "σ_μ  -0.5 <= Δ … caf\\xe9 \\u2016g\\u2016 \\u2603"
    assert said(text, "utf-8", monkeypatch) == text.encode()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("more", ["", "logging.basicConfig(stream=sys.%s); logging.error('x'); "])
def test_the_rest_is_dropped_once_nobody_reads(stream: str, more: str) -> None:
    code = f"{HELLO}import logging; {more % stream if more else more}"
    code += f"[print('x' * 1000, file=sys.{stream}) for _ in range(1000)]; open('/dev/null'); sys.exit(3)"
    other = "stderr" if stream == "stdout" else "stdout"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    getattr(process, stream).close()
    assert getattr(process, other).read() == b""
    assert process.wait() == 3


def test_streams_are_replaced_once_and_stay_open() -> None:
    code = (
        f"{HELLO}import gc, os; sys.stdout = open(os.devnull, 'w'); console.steady(); first = sys.stdout; "
        "console.steady(); assert sys.stdout is first; gc.collect(); print('x', flush=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
