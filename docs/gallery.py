"""Draw every chart for docs/gallery.md, and write that page: `python docs/gallery.py`.

The page shows the commands that are run here. They read tables in studies/ alone, so that anybody can run them.
"""

import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from lnjac.cli.main import app
from lnjac.reporting.charts import CHARTS

HERE = Path(__file__).resolve().parent
PAGE = HERE / "gallery.md"
IMAGES = "images/gallery"

FA = ("--where", "method == 'fa'")
TABLES: dict[str, tuple[str, ...]] = {
    "cost": ("cost/cost250", *FA),
    "ranking": ("tiny/rates",),
    "headline": ("cost/width",),
    "cost-difference": ("cost/cost250", *FA),
    "diverged": ("tiny/rates",),
    "heatmap": ("cost/width",),
    "seeds": ("cost/width",),
    "curves": ("cost/step",),
    "depth": ("cost/width",),
    "losses": ("tiny/first", "--metric", "train_loss_nats"),
    "backwards": ("tiny/first", "--metric", "train_loss_nats"),
    "scaling-width": ("cost/width",),
    "scaling-depth": ("tiny/sizes", "--where", "steps == 400"),
    "scaling-steps": ("tiny/sizes", "--where", "`model.n_layer` == 4"),
}
"""For each chart a table in studies/ that it can show, and options."""
ELSEWHERE = {
    "images/cost.svg": ("cost", "cost/cost250", *FA),
    "images/tutorial-cost.svg": ("cost", "tiny/first"),
}
"""Pictures of other pages: their chart, table and options."""

BEGIN = """# Gallery

Every chart that a report shows and `lnjac plot` draws. `python docs/gallery.py` draws them with the commands below,
from tables in `studies/`, and writes this page. `lnjac plot TABLE` lists the charts that your own table can show, and what it
lacks for each other chart.

`studies/cost` is [the study](study.md)'s. `studies/tiny` has three small sweeps of `model=tiny method=bp`: the tutorial's
(`first`), 36 learning rates of SGD (`rates`), and depths and numbers of updates (`sizes`). `lnjac command TABLE RUN_ID`
prints how each of their runs was made.

For a paper, add the size: `--width 3.25in --font-size 8 --no-title -o X.pdf` ([Save one chart](report.md#save-one-chart)).
"""


def command(name: str, table: str, *options: str, output: str) -> list[str]:
    """Return the words of the command that draws a chart."""
    return ["lnjac", "plot", f"studies/{table}.parquet", "--figure", name, *options, "-o", output]


def page() -> str:
    """Return the page: below the title of each section its charts, each with its meaning, its picture and its command."""
    return "\n".join([BEGIN, *_sections()])


def _sections() -> Iterator[str]:
    for title, charts in groupby(CHARTS.values(), lambda chart: chart.title):
        yield f"## {title}\n"
        for chart in charts:
            words = command(chart.name, *TABLES[chart.name], output=f"{chart.name}.svg")
            yield f"### {chart.name}\n{chart.summary}\n"
            yield f"![{chart.summary}]({IMAGES}/{chart.name}.svg)\n"
            yield f"```sh\n{' '.join(map(_quoted, words))}\n```\n"


def _quoted(word: str) -> str:
    """Return a word for a shell, in double quotes where single ones would hide a text that holds them."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def main() -> None:
    """Draw all pictures and write the page."""
    pictures = {f"{IMAGES}/{name}.svg": (name, *words) for name, words in TABLES.items()} | ELSEWHERE
    for path, words in pictures.items():
        app(command(*words, output=str(HERE / path))[1:], standalone_mode=False)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
