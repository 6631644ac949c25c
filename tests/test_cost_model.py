"""experiments/cost_model.py: its arithmetic, against cases worked out by hand, and its measurement of each stage."""

import cost_model
import pandas as pd
import pytest
from conftest import RERANKERS
from cost_model import Stages

from pyterrier_lit.models.pairs import PairLayout
from pyterrier_lit.models.pe_prompts import Prompter
from pyterrier_lit.models.t5_pieces import SentencePieces
from pyterrier_lit.models.text_encoder import TextEncoder

STAGES = Stages(loading=0.001, frame=0.003, packing=0.002, tokenising=0.04, model=0.36, bytes=50_000)


@pytest.fixture
def candidates():
    """Two queries with 30 different passages each."""
    rows = [(qid, f"fox {qid}", f"{qid}-{i}", f"a fox {i} {qid}") for qid in "ab" for i in range(30)]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text"])


def test_the_drivers_stages_come_first_and_the_workers_share_theirs():
    assert cost_model.seconds(STAGES) == pytest.approx({"driver": 0.004, "tokenising": 0.04, "model": 0.36})
    eight = cost_model.seconds(STAGES, 8, cores=4)
    assert eight == pytest.approx({"driver": 0.004, "tokenising": 0.00125, "model": 0.045})
    assert cost_model.rate(STAGES, 8, cores=4) == pytest.approx(1 / 0.05025)


def test_of_computing_packing_and_sending_only_the_slowest_counts():
    assert cost_model.seconds(STAGES, 400) == pytest.approx({"driver": 0.004, "packing": 0.002})
    slow = cost_model.seconds(STAGES, 400, network=1e6)
    assert slow == pytest.approx({"driver": 0.004, "network": 0.05})


def test_the_bottleneck_moves_from_the_model_to_the_tokeniser_to_the_driver():
    assert cost_model.bottleneck(STAGES, 8) == "model"
    fast = STAGES.with_model(queries_per_second=1_000)
    assert fast.model == 0.001 and cost_model.bottleneck(fast, 8) == "tokenising"
    assert cost_model.bottleneck(fast, 8, cores=4) == "driver"
    assert cost_model.bottleneck(STAGES, 400, network=1e6) == "network"


def test_at_the_turning_point_the_model_takes_as_long_as_tokenising_or_the_driver():
    assert cost_model.turning_point(STAGES, 8) == pytest.approx(9)  # 0.36 / 0.04: tokenising
    assert cost_model.turning_point(STAGES, 8, cores=4) == pytest.approx(11.25)  # 0.36 / 8 / 0.004: the driver


def test_machines_for_a_million_queries_a_day():
    assert cost_model.rate(STAGES) == pytest.approx(1 / 0.404)  # 2.48 queries per second; a million per day are 11.57
    assert cost_model.machines(STAGES, 1_000_000, workers=1) == 5
    assert cost_model.machines(STAGES, 1_000_000, workers=8) == 1
    assert cost_model.machines(STAGES, 10_000_000, workers=8) == 7  # 115.7 queries per second, 18.52 per machine


def test_no_number_of_workers_passes_the_driver_and_at_half_its_rate_they_are_half_idle():
    assert cost_model.workers_half_idle(STAGES) == pytest.approx(100)
    assert cost_model.rate(STAGES, 100) == pytest.approx(1 / 0.008)
    assert cost_model.rate(STAGES, 25) == pytest.approx(0.8 * 25 / 0.4)  # a fifth of the time is the driver's
    assert cost_model.rate(STAGES, 10**6) < 1 / 0.004


@pytest.mark.parametrize("name", RERANKERS)
def test_tokenising_is_measured_on_what_a_call_reads(name, candidates, monkeypatch):
    kind, folder, *_ = RERANKERS[name]
    reranker = kind(str(folder), device="cpu")
    read = []

    def watched(original):
        def read_too(self, texts, *others):
            read.extend(texts)
            return original(self, texts, *others)

        return read_too

    tokenisers = ((PairLayout, "pieces"), (SentencePieces, "__call__"), (TextEncoder, "pieces"), (Prompter, "ids"))
    for owner, method in tokenisers:
        monkeypatch.setattr(owner, method, watched(getattr(owner, method)))
    queries, lists = ["fox a", "fox b"], [ranking.text.tolist() for _, ranking in candidates.groupby("qid")]
    columns = reranker.columns(lists)
    reranker.results(queries, columns)
    by_call = sum(text.count("fox") for text in read)
    read.clear()
    cost_model.tokenise(reranker, queries, columns)
    assert by_call == sum(text.count("fox") for text in read) > 60


def test_every_stage_of_every_reranker_is_measured_and_the_drivers_once(candidates, tmp_path):
    loader = cost_model.stored(candidates, tmp_path)
    rerankers = {name: kind(str(folder), device="cpu") for name, (kind, folder, *_) in RERANKERS.items()}
    measured = cost_model.measure(rerankers, candidates, loader)
    assert list(measured) == list(RERANKERS)
    for stages in measured.values():
        assert min(vars(stages).values()) > 0 and stages.model > stages.packing
        assert stages.bytes > candidates["text"].str.len().sum() / 2
    assert len({(stages.loading, stages.frame, stages.packing, stages.bytes) for stages in measured.values()}) == 1


def test_texts_come_back_from_the_file_in_which_they_were_stored(candidates, tmp_path):
    loader = cost_model.stored(pd.concat([candidates, candidates.head(3)]), tmp_path)
    pd.testing.assert_frame_equal(loader(candidates.drop(columns="text")), candidates)
