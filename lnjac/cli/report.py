"""Commands that draw: a report as one page, or one chart of it as a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lnjac.cli.options import AsJson, Sources, Where, length
from lnjac.cli.tables import ascii_json
from lnjac.errors import ConfigError
from lnjac.escape import visible

if TYPE_CHECKING:
    from lnjac.reporting.view import View

commands = typer.Typer(rich_markup_mode=None)

By = Annotated[
    str | None, typer.Option(help="The config column whose levels are compared; attn_mode, or the first that varies.")
]


@commands.command()
def report(
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, X.html.")],
    by: By = None,
    where: Where = None,
    title: Annotated[str | None, typer.Option(help="The page's title; the sources' names unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that needs no network: the runs, their differences and costs as charts and tables.

    \b
    Example:
        lnjac report multirun/A -o report.html
        lnjac report all.parquet -o fa.html --by attn_mode --where "method == 'fa'"
    """
    from lnjac.reporting import report as reporting

    made = reporting.report(sources, output=output, by=by, where=where, title=title)
    size = output.stat().st_size
    if as_json:
        print(ascii_json({"output": str(output), "bytes": size, "sections": made.sections}))
        return
    charts = sum(map(len, made.sections.values()))
    print(f"{visible(str(output))}: {size / 1e6:.2f} MB, {charts} charts")


@commands.command()
def plot(
    sources: Sources,
    figure: Annotated[
        str | None, typer.Option(help="The chart's name; without it, list the charts that the table can show.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The picture: X.svg, X.png or X.pdf.")] = None,
    metric: Annotated[str | None, typer.Option(help="A column of layers or of runs; the chart's first.")] = None,
    by: By = None,
    where: Where = None,
    width: Annotated[str, typer.Option(help="The picture's width, in in, cm, mm or pt.")] = "6.5in",
    height: Annotated[
        str | None, typer.Option(help="The picture's height; as the chart needs it unless given.", show_default=False)
    ] = None,
    font_size: Annotated[float, typer.Option(min=4, max=72, help="The height of its text in points.")] = 9.0,
    title: Annotated[bool, typer.Option("--title/--no-title", help="Write the caption above the chart.")] = True,
    dark: Annotated[bool, typer.Option("--dark", help="Light on dark.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw one chart of the report as a file, or list the charts that a table can show and why it cannot show others.

    \b
    Example:
        lnjac plot all.parquet
        lnjac plot multirun/A --figure headline --metric radial_share -o headline.svg
        lnjac plot all.parquet --figure cost --where "method == 'fa'" -o cost.pdf --width 3.25in --font-size 8 --no-title
    """
    from lnjac.comparing.filter import require_column
    from lnjac.comparing.tables import open_tables
    from lnjac.reporting import marks, pictures
    from lnjac.reporting.charts import CHARTS
    from lnjac.reporting.view import view

    marks.require_extra()  # without it every chart would be one that these runs cannot show
    points = None if height is None else length(height, "--height")
    size = pictures.Size(length(width, "--width"), points, font_size)
    if figure is None:
        if output is not None:
            raise ConfigError(f"--figure is missing, the chart to draw: choose one of {', '.join(CHARTS)}")
        _list(view(open_tables(sources), by, where), as_json)
        return
    require_column(figure, list(CHARTS), "no chart for --figure is called")
    if output is None or output.suffix not in pictures.FORMATS:
        raise ConfigError(f"the output {output or ''} must end in {', '.join(pictures.FORMATS)}: try -o {figure}.svg")
    shown = view(open_tables(sources), by, where)
    if metric is None and (reason := CHARTS[figure].lacking(shown)):
        able = [name for name, other in CHARTS.items() if other.lacking(shown) is None]
        raise ConfigError(f"--figure {figure}: {reason}; these runs can show {', '.join(able) or 'no chart'}")
    drawing = CHARTS[figure].draw(shown, metric)
    output.parent.mkdir(parents=True, exist_ok=True)
    said = drawing.caption + (f" Where {where}." if where else "")
    pictures.save(drawing.picture, output, "dark" if dark else "light", size, title=said if title else None)
    if as_json:
        print(ascii_json({"output": str(output), "caption": drawing.caption, "notes": list(drawing.notes)}))
        return
    options = [f"{choice[0]}, one of {len(choice)}" for choice in drawing.choices.values() if len(choice) > 1]
    print(visible(f"{output}: {drawing.caption}" + "".join(f" Shows {one}." for one in options)))


def _list(shown: "View", as_json: bool) -> None:
    """Print each chart: what it shows, or the reason for which it cannot be drawn."""
    from lnjac.reporting.charts import CHARTS

    lacking = {name: chart.lacking(shown) for name, chart in CHARTS.items()}
    if as_json:
        print(
            ascii_json({name: {"summary": CHARTS[name].summary, "lacking": reason} for name, reason in lacking.items()})
        )
        return
    width = max(map(len, lacking))
    for name, reason in lacking.items():
        line = f"{name:{width}}  {CHARTS[name].summary}" if reason is None else f"{name:{width}}  not shown: {reason}"
        print(visible(line))
