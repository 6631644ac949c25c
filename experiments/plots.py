"""Charts that several notebooks draw with matplotlib, mostly from tables of `compare.table`."""

import compare
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


def systems(table: pd.DataFrame) -> pd.Series:
    """The name of the ranking in each row: "MODEL over STAGE", or "STAGE" for a first stage alone."""
    alone = table["model"] == compare.FIRST_STAGE
    return table["first_stage"].where(alone, table["model"] + " over " + table["first_stage"])


def dots(table: pd.DataFrame, title: str, per_row: int = 5) -> Figure:
    """A chart with one panel per collection. A panel has one line for each of `systems(table)`. On a line, a ring shows
    the published figure, and a disc shows the measured one."""
    lines = list(dict.fromkeys(systems(table)))
    collections = list(dict.fromkeys(table["collection"]))
    columns, rows_of_panels = min(per_row, len(collections)), -(-len(collections) // per_row)
    size = (2.4 * columns + 3.5, (0.26 * len(lines) + 0.9) * rows_of_panels + 0.5)
    figure, panels = pyplot.subplots(
        rows_of_panels, columns, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for panel in panels.flat[len(collections) :]:
        panel.axis("off")
    for panel, name in zip(panels.flat, collections, strict=False):
        rows = table[table["collection"] == name]
        at = systems(rows).map(lines.index)
        panel.scatter(rows["published"], at, s=45, facecolors="none", edgecolors="tab:gray", label="published")
        panel.scatter(rows["measured"], at, s=22, color="tab:blue", label="measured", zorder=3)
        panel.set_title(name, fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
    for panel in panels.flat[len(collections) - columns : len(collections)]:  # the lowest panel of each column
        panel.tick_params(labelbottom=True)
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(lines)), lines)
    figures = table[["published", "measured"]]
    panels[0][0].set_xlim(figures.min(axis=None) - 0.02, figures.max(axis=None) + 0.02)  # all panels share both axes
    panels[0][0].set_ylim(len(lines) - 0.5, -0.5)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.supxlabel("nDCG@10")
    pyplot.close(figure)  # the notebook shows what the cell returns
    return figure


def log_scale(panel: Axes, name: str = "x") -> None:
    """Make the x-axis (or "y") of a panel logarithmic, with few ticks that are labelled with plain numbers."""
    panel.set(**{f"{name}scale": "log"})
    axis = getattr(panel, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
