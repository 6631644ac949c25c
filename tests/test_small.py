"""experiments/small.py and workplace.py: the small profile reads only files that exist, and has enough questions for a
chart. A notebook gets the parameters of the chosen profile."""

from pathlib import Path

import corpora
import pytest
import small
import workplace


def test_the_small_profile_reads_nothing_that_is_not_there():
    for comparison in (*small.trec_dl(), *small.beir(), *small.tirex()):
        for where in comparison.collections.values():
            assert where.source.startswith("python-docs") or Path(where.source).exists()
    for reranker in small.rerankers().values():
        assert Path(reranker.model).is_dir(), f"{reranker.model} is missing: make tiny"


def test_what_the_small_profile_draws_is_of_thirty_questions_or_more():
    assert len(corpora.load(small.PYTHON_DOCS.source).get_topics()) >= 30


def test_a_notebook_gets_the_parameters_of_the_chosen_profile_and_no_other_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile, folder = workplace.enter("runs", "mine", small=lambda: 1 / 0, runs=lambda: {"depth": 7})
    assert (profile.depth, profile.verbose) == (7, False)
    assert folder == Path("results/runs/mine") and folder.is_dir()
    with pytest.raises(ValueError, match="PROFILE='big'; wanted one of 'small', 'runs'"):
        workplace.enter("big", "mine", small=dict, runs=dict)
