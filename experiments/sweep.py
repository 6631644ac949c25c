"""One experiment of a sweep: pipelines over one first stage, whose runs are kept, so that a sweep goes on where it stopped."""

import zlib
from pathlib import Path

import compare
import pandas as pd
import pyterrier as pt


def experiment(
    pipelines: dict[str, pt.Transformer],
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    measures: list,
    folder: Path,
    *,
    baseline: str = compare.FIRST_STAGE,
    verbose: bool = False,
) -> pd.DataFrame:
    """`pt.Experiment` over pipelines by name, with paired t-tests against the one named `baseline`, Holm-corrected.

    folder: keeps each pipeline's run. A run is used again when the pipeline's repr and the topics are the same; delete it
        when a checkpoint behind a name has changed. verbose: a bar over the pipelines, with the time that is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if baseline not in pipelines:
        raise ValueError(f"baseline={baseline!r} is none of the pipelines {', '.join(map(repr, pipelines))}")
    asked = topics.to_csv(index=False)
    files = {
        f"{name.replace('/', '--')} {zlib.crc32((repr(pipeline) + asked).encode()):08x}": name
        for name, pipeline in pipelines.items()
    }
    table = pt.Experiment(
        list(pipelines.values()),
        topics,
        qrels,
        measures,
        names=list(files),
        baseline=list(pipelines).index(baseline) if len(pipelines) > 1 else None,
        correction="holm" if len(pipelines) > 1 else None,
        save_dir=str(folder),
        save_mode="reuse",
        verbose=verbose,
    )
    return table.assign(name=table["name"].map(files))
