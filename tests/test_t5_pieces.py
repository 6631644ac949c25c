"""models.t5_pieces: the same ids from a spiece.model and from the tokenizer.json that transformers 5 makes of it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import GOLDEN, T5, TINY

from pyterrier_lit import LiT5Distill, LiT5Score
from pyterrier_lit.models.t5_pieces import SentencePieces, sentencepiece_model

ODD = [
    "a",
    "the ",
    "\u2581",
    " ",
    "  ",
    "</s>",
    "<unk>",
    "<extra_id_0>",
    "ﬁ",
    "\uff21",
    "é",
    "e\u0301",
    "\u0085",
    "🙂",
    "中",
]


@pytest.fixture(scope="module", params=[T5, TINY / "lit5-distill"], ids=["random", "tiny"])
def both(request, tmp_path_factory):
    """A folder with a spiece.model, and a folder with the tokenizer.json that transformers makes of it."""
    saved = tmp_path_factory.mktemp("saved")
    transformers.AutoTokenizer.from_pretrained(request.param).save_pretrained(saved)
    (saved / "spiece.model").unlink(missing_ok=True)
    return request.param, saved


def fields_of(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_tokenizer_json_gives_the_ids_and_the_texts_of_the_spiece_model_it_was_made_from(both):
    plain, saved = both
    ours = SentencePieces((plain / "spiece.model").read_bytes())
    again = SentencePieces(sentencepiece_model(fields_of(saved)))
    lines = map(json.loads, (GOLDEN / "lit5" / "data.jsonl").read_text(encoding="utf-8").splitlines())
    texts = [text for line in lines for text in (line["query"], *(doc["text"] for doc in line["docs"]))]
    drawn = random.Random(0)
    texts += ["".join(drawn.choices([*ODD, ".", "...", "\n", "[3] "], k=drawn.randint(0, 20))) for _ in range(2_000)]
    ids = ours(texts)
    assert again(texts) == ids
    assert again.processor.get_piece_size() == ours.processor.get_piece_size()
    assert [again.decode(row) for row in ids[:200]] == [ours.decode(row) for row in ids[:200]]


def test_a_normaliser_inside_others_is_found(both):
    fields = fields_of(both[1])
    wrapped = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [fields["normalizer"]]}, None]}
    assert sentencepiece_model(fields | {"normalizer": wrapped}) == sentencepiece_model(fields)
    without = SentencePieces(sentencepiece_model(fields | {"normalizer": None}))
    assert without(["ﬁ"]) != SentencePieces(sentencepiece_model(fields))(["ﬁ"])


@pytest.mark.parametrize("kind", [LiT5Distill, LiT5Score])
def test_a_checkpoint_that_transformers_saved_again_scores_as_before_and_saves_a_spiece_model(kind, frame, tmp_path):
    source, again = TINY / f"lit5-{kind.__name__.removeprefix('LiT5').lower()}", tmp_path / "again"
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(again)
    transformers.T5ForConditionalGeneration.from_pretrained(source, dtype="auto").save_pretrained(again)
    (again / "spiece.model").unlink(missing_ok=True)
    fields = json.loads((source / "config.json").read_text())
    recorded = {key: fields[key] for key in ("window_size", "stride", "lengths") if key in fields}
    (again / "config.json").write_text(json.dumps(json.loads((again / "config.json").read_text()) | recorded))
    expected, reranker = kind(str(source), device="cpu")(frame), kind(str(again), device="cpu")
    assert reranker(frame)["score"].tolist() == pytest.approx(expected["score"].tolist(), rel=1e-5)
    reranker.save(tmp_path / "saved")
    saved = kind(str(tmp_path / "saved"), device="cpu")
    assert saved(frame)["score"].tolist() == pytest.approx(expected["score"].tolist(), rel=1e-5)


def test_a_tokenizer_of_another_kind_is_refused(both, tmp_path, frame):
    shutil.copytree(T5, tmp_path, dirs_exist_ok=True)
    (tmp_path / "spiece.model").unlink()
    bpe = GOLDEN / "cross_encoder" / "ckpt" / "electra_bias" / "tokenizer.json"
    for content in (bpe.read_bytes(), b"{}", b"[]", (both[1] / "tokenizer.json").read_bytes()[:-9]):
        Path(tmp_path, "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
            LiT5Distill(str(tmp_path), device="cpu")(frame)
