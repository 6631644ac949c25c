"""experiments/profiles.py: the small profile's inputs lie on every disk, and it says when it leaves topics out."""

from pathlib import Path

import profiles

PAPER, SMALL = profiles.paper(), profiles.small()


def test_the_paper_profile_evaluates_all_topics_and_the_small_one_says_when_it_does_not():
    assert {comparison.topics for comparison in (*PAPER.trec_dl, *PAPER.beir, *PAPER.tirex)} == {None}
    for comparison in (*SMALL.trec_dl, *SMALL.beir, *SMALL.tirex):
        assert comparison.topics is not None or not comparison.rerankers


def test_the_small_profile_reads_nothing_that_is_not_there():
    for comparison in (*SMALL.trec_dl, *SMALL.beir, *SMALL.tirex):
        for where in comparison.collections.values():
            assert where.source.startswith("python-docs") or Path(where.source).exists()
    for reranker in profiles.tiny().values():
        assert Path(reranker.model).is_dir(), f"{reranker.model} is missing: make tiny"
