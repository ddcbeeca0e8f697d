"""Commands that draw: a report as one page, or one of its figures as a file."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lnjac.cli.options import AsJson, Sources, study
from lnjac.cli.tables import ascii_json
from lnjac.errors import ConfigError
from lnjac.escape import visible

commands = typer.Typer(rich_markup_mode=None)

WIDTH = 680
"""Pixels of a figure of its own."""


class Figure(str, Enum):
    headline = "headline"
    heatmap = "heatmap"
    trajectory = "trajectory"
    cost = "cost"
    depth = "depth"
    scaling = "scaling"


By = Annotated[
    str | None, typer.Option(help="The config column whose levels are compared; attn_mode, or the first that varies.")
]
Where = Annotated[str | None, typer.Option(help="Only runs for which this holds, such as \"method == 'fa'\".")]


@commands.command()
def report(
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, X.html.")],
    by: By = None,
    where: Where = None,
    title: Annotated[str | None, typer.Option(help="The page's title; the sources' names unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that needs no network: what was run, what differs, where, since when, and what it costs.

    \b
    Example:
        lnjac report multirun/A -o report.html
        lnjac report all.parquet -o fa.html --by attn_mode --where "method == 'fa'"
    """
    from lnjac.reporting.report import make

    if output.suffix != ".html":
        raise ConfigError(f"the output {output} must end in .html: try {output.name}.html")
    made = make(
        study(sources), title=title or ", ".join(path.name or str(path) for path in sources), by=by, where=where
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    made.write(output)
    size = output.stat().st_size
    if as_json:
        print(ascii_json({"output": str(output), "bytes": size, "sections": made.sections}))
        return
    charts = sum(section["charts"] for section in made.sections.values())
    print(f"{visible(str(output))}: {size / 1e6:.2f} MB, {charts} charts")


@commands.command()
def plot(
    sources: Sources,
    figure: Annotated[Figure, typer.Option(help="Which figure of the report.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: X.svg, X.png or X.pdf.")],
    metric: Annotated[str | None, typer.Option(help="A column of layers or of runs, where there is a choice.")] = None,
    by: By = None,
    where: Where = None,
    dark: Annotated[bool, typer.Option("--dark", help="Light on dark.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw one figure of the report as a file.

    \b
    Example:
        lnjac plot multirun/A --figure headline --metric radial_share -o headline.svg
        lnjac plot all.parquet --figure cost --where "method == 'fa'" -o cost.pdf
    """
    from lnjac.reporting import charts as figures
    from lnjac.reporting import frames as views

    if output.suffix not in figures.FORMATS:
        raise ConfigError(f"the output {output} must end in {', '.join(figures.FORMATS)}")
    drawing = views.FIGURES[figure.value](views.view(study(sources), by, where), metric)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures.save(drawing.chart, output, figures.DARK if dark else figures.LIGHT, width=WIDTH)
    if as_json:
        print(ascii_json({"output": str(output), "caption": drawing.caption, "notes": list(drawing.notes)}))
        return
    shown = [f"{options[0]}, one of {len(options)}" for options in drawing.choices.values() if len(options) > 1]
    print(visible(f"{output}: {drawing.caption}" + "".join(f" Shows {one}." for one in shown)))
