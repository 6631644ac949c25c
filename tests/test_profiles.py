"""experiments/profiles.py: the small profile reads nothing that is not in the repository or beside it, and evaluates on
questions enough for a chart."""

from pathlib import Path

import corpora
import profiles

SMALL = profiles.small()


def test_the_small_profile_reads_nothing_that_is_not_there():
    for comparison in (*SMALL.trec_dl, *SMALL.beir, *SMALL.tirex):
        for where in comparison.collections.values():
            assert where.source.startswith("python-docs") or Path(where.source).exists()
    for reranker in profiles.tiny().values():
        assert Path(reranker.model).is_dir(), f"{reranker.model} is missing: make tiny"


def test_what_the_small_profile_draws_is_of_thirty_questions_or_more():
    sources = {SMALL.pipelines["collection"], SMALL.efficiency["collection"].source}
    sources |= {SMALL.open_questions["collection"].source}
    sources |= {where.source for where in SMALL.distillation["test"].values()}
    for source in sources:
        assert len(corpora.load(source).get_topics()) >= 30, source
