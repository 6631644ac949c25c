"""Charts that several notebooks draw. Knows tables of `compare.table` and matplotlib."""

import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure


def dots(table: pd.DataFrame, title: str) -> Figure:
    """One panel per collection, one line per first stage and model: published figures as rings, measured ones as discs."""
    lines = list(dict.fromkeys(table["model"] + "  <  " + table["first_stage"]))
    collections = list(dict.fromkeys(table["collection"]))
    figure, panels = pyplot.subplots(
        1,
        len(collections),
        sharey=True,
        squeeze=False,
        figsize=(2.8 * len(collections) + 3.5, 0.26 * len(lines) + 1.3),
        layout="constrained",
    )
    for panel, name in zip(panels[0], collections, strict=True):
        rows = table[table["collection"] == name]
        at = (rows["model"] + "  <  " + rows["first_stage"]).map(lines.index)
        panel.scatter(rows["published"], at, s=45, facecolors="none", edgecolors="tab:gray", label="published")
        panel.scatter(rows["measured"], at, s=22, color="tab:blue", label="measured", zorder=3)
        panel.set(title=name, xlabel="nDCG@10")
        panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_yticks(range(len(lines)), lines, fontsize="small")
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle(title)
    pyplot.close(figure)  # the notebook shows what the cell returns
    return figure
