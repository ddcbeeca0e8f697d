"""--where: what it finds, what it says of a slip, and that nothing but comparisons gets through."""

from contextlib import suppress

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lnjac.comparing.filter import LONGEST, Where
from lnjac.errors import ConfigError

FRAME = pd.DataFrame(
    {
        "seed": [1, 2, 3, 4],
        "method": ["fa", "fa", "bp", None],
        "model.n_embd": [64, 128, 64, 256],
        "attn_mode.bias": [float("nan"), -4.0, float("nan"), -2.0],
        "dirty": [True, False, False, True],
        "odd name": [1.0, 2.0, 3.0, 4.0],
        "class": [0, 0, 1, 1],
    }
)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("method == 'fa'", [1, 2]),
        ("method != 'fa'", [3, 4]),
        ("method in ['fa', 'dfa']", [1, 2]),
        ("seed not in (1, 2)", [3, 4]),
        ("model.n_embd == 64 and method == 'bp'", [3]),
        ("`model.n_embd` > 64 or seed == 1", [1, 2, 4]),
        ("(model.n_embd == 64) & (seed > 1)", [3]),
        ("(seed == 1) | (seed == 4)", [1, 4]),
        ("not seed == 1", [2, 3, 4]),
        ("~dirty", [2, 3]),
        ("dirty and seed < 3", [1]),
        ("1 < seed <= 3", [2, 3]),
        ("seed % 2 == 0", [2, 4]),
        ("model.n_embd / 64 - seed >= 0", [1, 2, 4]),
        ("-attn_mode.bias > 3", [2]),
        ("attn_mode.bias in [-4.0, 5]", [2]),
        ("attn_mode.bias == None", [1, 3]),
        ("method != None", [1, 2, 3]),
        ("None == attn_mode.bias", [1, 3]),
        ("None == method", [4]),
        ("None != method", [1, 2, 3]),
        ("method in ['bp', None]", [3, 4]),
        ("attn_mode.bias in [None, -4.0]", [1, 2, 3]),
        ("attn_mode.bias not in [None]", [2, 4]),
        ("method != 'fa' and method != None", [3]),
        ("attn_mode.bias != -4.0", [1, 3, 4]),
        ("attn_mode.bias < 0", [2, 4]),
        ("`odd name` >= 3", [3, 4]),
        ("`class` == 1", [3, 4]),
        ("2 == seed", [2]),
    ],
)
def test_finds(text: str, seeds: list[int]):
    assert FRAME[Where(text).holds(FRAME)]["seed"].tolist() == seeds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "seed.__class__ == 1",
        "seed.map(print)",
        "().__class__.__bases__[0].__subclasses__()",
        "(lambda: 1)()",
        "[x for x in (1, 2)] == seed",
        "seed == (x := 1)",
        "f'{seed}' == '1'",
        "@pd.io",
        "seed == @seed",
        "open('x')",
        "`seed`.values",
        "`__import__`('os')",
        "`a`; import os",
        "import os",
        "seed()",
        "seed(1) == 1",
        "seed[0] == 1",
        "seed in seed",
        "seed in [method]",
        "seed in [print()]",
        "9 ** 9 ** 9 == seed",
        "seed << 99999999999 == 1",
        "'a' * 10000000000 == method",
        "[1] * 10000000000 == seed",
        "method * 1000 == 'a'",
        "seed if dirty else seed",
        "{'a': 1} == seed",
        "seed == b'1'",
        "seed == 1j",
        "seed == ...",
        "seed is None",
        "*seed",
        "yield seed",
        "await seed",
        "seed\x00 == 1",
        "(" * 300 + "seed == 1" + ")" * 300,
        "-" * 1900 + "seed == 1",
        "seed == 1 and " * 200 + "dirty",
        "",
        "seed",
        "1",
        "1 == 1",
        "seed + 1",
        "'fa'",
        "seed and dirty",
        "method < 1",
        "seed > 'a'",
        "nothing == 1",
        "_0_quoted == 1",
        "seed = 1",
    ],
)
def test_whatever_else_is_one_readable_line(text: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError) as error:
        Where(text).holds(FRAME)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300
    assert capfd.readouterr() == ("", "")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abseed_()[]{}.,:'\"`@=<>!~&|+-*/%0123 \n\\"), max_size=40))
def test_any_text_is_an_answer_or_a_known_error(text: str):
    with suppress(ConfigError):  # anything else is a bug
        assert Where(text).holds(FRAME).dtype == bool


def test_unknown_columns_come_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"model\.n_emb: did you mean model\.n_embd\?"):
        Where("model.n_emb == 64").holds(FRAME)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_is_refused_with_the_remedy(text: str):
    with pytest.raises(ConfigError, match=r"^--where is empty: leave it out for all rows"):
        Where(text)


def test_columns_are_known_before_any_frame_is():
    assert Where("model.n_embd == 64 and `odd name` in [1] or not dirty").columns == [
        "dirty",
        "model.n_embd",
        "odd name",
    ]


def test_too_long_is_said():
    with pytest.raises(ConfigError, match="shorten it"):
        Where(" " * LONGEST + "a")
