"""A real SPLADE over PISA before each reranker."""

import pandas as pd
import pytest
from conftest import SHARED

SPLADE = SHARED.parent / "models" / "splade-tiny"
TEXTS = [f"{word} and {other} of a {word}" for word in ("list", "file", "thread") for other in ("sort", "open", "lock")]


@pytest.mark.shared
def test_a_real_splade_stands_before_every_reranker(small, tmp_path):
    if not SPLADE.exists():
        pytest.skip("needs ../shared/models/splade-tiny, which is not part of the repository")
    pisa = pytest.importorskip("pyterrier_pisa", reason="needs the demo extra")
    splade = pytest.importorskip("pyterrier_splade", reason="needs pyterrier-splade").Splade(str(SPLADE), device="cpu")
    index = pisa.PisaIndex(str(tmp_path / "splade.pisa"), stemmer="none", threads=1)
    docs = pd.DataFrame({"docno": [f"d{i}" for i in range(len(TEXTS))], "text": TEXTS})
    (splade.doc_encoder() >> index.toks_indexer(scale=1.0)).index(docs.to_dict("records"))
    first = splade.query_encoder() >> index.quantized(num_results=5)
    found = first(pd.DataFrame([["q1", "lock a thread"], ["q2", "open files"]], columns=["qid", "query"]))
    best = found[found["rank"] == 0].set_index("qid")["docno"]
    assert best.to_dict() == {"q1": "d8", "q2": "d4"}  # the query "files" finds "file", unlike BM25 without a stemmer
    out = small()(found.merge(docs, on="docno"))
    assert len(out) == len(found) == 10 and out["score"].notna().all()
