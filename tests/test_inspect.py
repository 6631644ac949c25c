"""What pt.inspect, schematics and repr show of every public transformer, without a checkpoint and without Ray."""

import html
import re

import pandas as pd
import pyterrier as pt
import pytest

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.scale import Distributed
from pyterrier_lit.training import Distil, FineTune

MODEL = "no/such-model"
CLASSES = {
    kind.__name__: kind for kind in (CrossEncoder, LiT5Distill, LiT5Score, PERank, FineTune, Distil, Distributed)
}
TEXT, VECTOR = ["qid", "docno", "query", "text"], ["qid", "docno", "query", "doc_vec"]
RUN = pd.DataFrame({"qid": ["1", "1"], "docno": ["a", "b"], "score": [1.0, 0.5]})

# Constructor call, label in a schematic, alternative sets of input columns, attributes that are transformers
PUBLIC = [
    (f"CrossEncoder({MODEL!r}, doc_length=9)", "CrossEncoder", [TEXT], []),
    (f"LiT5Distill({MODEL!r}, window_size=20, top_k=5)", "LiT5-Distill", [TEXT], []),
    (f"LiT5Score({MODEL!r}, n_passages=50)", "LiT5-Score", [TEXT], []),
    (f"PERank({MODEL!r}, window_size=10, decoding='first')", "PE-Rank", [VECTOR, TEXT], []),
    (f"FineTune(CrossEncoder({MODEL!r}), steps=7)", "FineTune", [TEXT], ["student"]),
    (f"FineTune(PERank({MODEL!r}), recipe='pe-rank-alignment')", "FineTune", [VECTOR, TEXT], ["student"]),
    (f"Distil(LiT5Distill({MODEL!r}), None, seed=3)", "Distil", [TEXT], ["student"]),
    (f"Distil(LiT5Distill({MODEL!r}), 'teacher.run')", "Distil", [TEXT], ["student"]),
    (f"Distil(CrossEncoder({MODEL!r}), LiT5Distill({MODEL!r}), patience=2)", "Distil", [TEXT], ["student", "teacher"]),
    (f"Distributed(LiT5Score({MODEL!r}), num_workers=8, num_gpus=0.5)", "Distributed", [TEXT], ["reranker"]),
]


@pytest.fixture(params=PUBLIC, ids=lambda param: re.sub(r"'no/such-model'", "", param[0]))
def public(request):
    call, label, inputs, inside = request.param
    return eval(call, dict(CLASSES)), call, label, inputs, inside


def test_it_shows_the_call_that_makes_it_and_the_call_makes_it(public):
    transformer, call, *_ = public
    assert repr(transformer) == call


def test_inputs_and_outputs_are_inferred(public):
    transformer, _, _, inputs, _ = public
    assert pt.inspect.transformer_inputs(transformer) == inputs
    for columns in inputs:
        assert pt.inspect.transformer_outputs(transformer, [*columns, "title"]) == [*columns, "title", "score", "rank"]
        with pytest.raises(pt.validate.InputValidationError):
            pt.inspect.transformer_outputs(transformer, columns[:-1])


def test_an_answer_is_among_the_outputs():
    columns = pt.inspect.transformer_outputs(LiT5Score(MODEL, answer_field="answer"), TEXT)
    assert set(columns) == {*TEXT, "answer", "score", "rank"}


def test_attributes_rebuild_it_and_one_can_be_changed(public):
    transformer, call, *_ = public
    assert repr(pt.inspect.transformer_apply_attributes(transformer)) == call
    changed = pt.inspect.transformer_apply_attributes(transformer, verbose="yes")
    assert changed.verbose == "yes" and transformer.verbose != "yes" and type(changed) is type(transformer)
    for attribute in pt.inspect.transformer_attributes(transformer):
        assert attribute.value is getattr(transformer, attribute.name)


def test_the_transformers_inside_are_found(public):
    transformer, *_, inside = public
    assert pt.inspect.subtransformers(transformer) == {name: getattr(transformer, name) for name in inside}


def test_the_schematic_shows_label_settings_and_what_is_inside(public):
    transformer, _, label, inputs, inside = public
    pipeline = pt.schematic.transformer_schematic(transformer, input_columns=[*inputs[0], "score", "rank"])
    assert pipeline["label"] == label and len(label) <= 20
    assert pipeline.get("input_validation_error") is None
    assert pipeline["settings"].keys() == {
        attribute.name for attribute in pt.inspect.transformer_attributes(transformer) if attribute.name not in inside
    }
    drawn = pt.schematic.draw(pt.RankCutoff(100) >> transformer)
    assert label in drawn and all(f">{name}<" in re.sub(r"\s", "", drawn) for name in inside)
    assert html.escape(MODEL) in drawn


def test_a_pipeline_without_texts_is_drawn_with_what_is_missing(public):
    transformer, *_ = public
    first = pt.Transformer.from_df(
        pd.DataFrame({"qid": ["1"], "query": ["q"], "docno": ["d"], "score": [1.0], "rank": [0]})
    )
    assert re.search(r"<b>text</b>|<b>doc_vec</b>", pt.schematic.draw(first >> transformer))


def test_a_run_in_a_frame_is_shown_in_one_line():
    assert repr(Distil(CrossEncoder(MODEL), RUN)) == f"Distil(CrossEncoder({MODEL!r}), <DataFrame of (2, 3)>)"


def test_every_public_transformer_is_inspected():
    assert {call.split("(")[0] for call, *_ in PUBLIC} == CLASSES.keys()
