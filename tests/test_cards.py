"""Model cards: what `save` writes beside a checkpoint for whoever finds it."""

import pytest
import yaml
from conftest import ROOT, TINY

from pyterrier_lit import CrossEncoder
from pyterrier_lit.models.hub import CARD
from pyterrier_lit.training import Distil, FineTune


def parts(folder):
    """Return the metadata of a model card as a dict, and its text."""
    _, head, text = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_card_says_what_a_checkpoint_is_and_how_it_is_loaded(small, tmp_path):
    reranker = type(small())(small().model, device="cpu")
    reranker.save(tmp_path / "mine")
    kind = type(reranker).__name__
    head, text = parts(tmp_path / "mine")
    assert head == {
        "library_name": "pyterrier-lit",
        "pipeline_tag": "text-ranking",
        "tags": ["pyterrier", "reranking", kind.lower()],
    }
    assert f'>> {kind}("mine")' in text and f"model: `{reranker.model.rpartition('/')[2]}`" in text
    assert "# mine\n" in text and str(tmp_path) not in text and str(ROOT) not in text


@pytest.fixture
def labelled(frame):
    """The frame, and qrels that judge some passages of each query relevant."""
    qrels = frame[["qid", "docno"]].sort_values(["qid", "docno"])
    return frame, qrels.assign(label=[i % 2 for i in range(len(frame))])


def test_a_trained_student_s_card_has_teacher_recipe_and_measures(electra, labelled, tmp_path):
    frame, qrels = labelled
    student = CrossEncoder.from_backbone(str(electra), device="cpu")
    quick = {"steps": 2, "batch_size": 2, "verbose": False}
    FineTune(student, **quick).fit(frame, qrels, frame, qrels)
    Distil(student, CrossEncoder(str(TINY / "cross-encoder"), device="cpu"), **quick).fit(frame)
    student.save(tmp_path / "mine")
    _, text = parts(tmp_path / "mine")
    assert f"begun with: `{electra.name}`" in text and "query_length: 32\n- doc_length: 256" in text
    first, second = text.partition("## Training")[2].partition("## Use")[0].split("And then")
    assert "learned from: labels, 2 lists" in first and "recipe: rank-distillm-labels (learning_rate=1e-05" in first
    assert "nDCG@10: " in first and "on validation queries" in first and "loss: " in first
    assert "learned from: the ranking of CrossEncoder('cross-encoder', device='cpu'), 2 lists" in second
    assert "nDCG" not in second and "steps=2" in second


def test_a_card_goes_along_with_what_is_loaded_and_saved_again(electra, labelled, tmp_path):
    student = CrossEncoder.from_backbone(str(electra), device="cpu")
    FineTune(student, steps=1, batch_size=2, verbose=False).fit(*labelled)
    student.save(tmp_path / "mine")
    card = tmp_path / "mine" / CARD
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    CrossEncoder(str(tmp_path / "mine"), device="cpu").save(tmp_path / "other", layout="transformers")
    head, text = parts(tmp_path / "other")
    assert head["license"] == "mit" and head["library_name"] == "sentence-transformers"
    assert "## Training" in text and '"mine"' not in text and text.count("## In other libraries") == 1
    assert 'SentenceCrossEncoder("other")' in text and '>> CrossEncoder("other")' in text
    CrossEncoder(str(tmp_path / "other"), device="cpu").save(tmp_path / "third")
    assert parts(tmp_path / "third") == (head, text.replace("# other\n", "# third\n").replace('"other"', '"third"'))


def test_a_further_training_keeps_the_name_of_the_first_model(electra, labelled, tmp_path):
    CrossEncoder.from_backbone(str(electra), device="cpu").save(tmp_path / "mine")
    card = tmp_path / "mine" / CARD
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: google/electra-base-discriminator\n", 1))
    student = CrossEncoder(str(tmp_path / "mine"), device="cpu")
    FineTune(student, steps=1, batch_size=2, verbose=False).fit(*labelled)
    student.save(tmp_path / "further")
    head, text = parts(tmp_path / "further")
    assert head["base_model"] == "google/electra-base-discriminator" and "begun with: `mine`" in text


def trainings(folder):
    """Return the lines about each training in a model card."""
    _, text = parts(folder)
    return [part.strip() for part in text.partition("## Training")[2].partition("## Use")[0].split("And then")]


def test_trainings_go_along_by_way_of_the_hub_and_further_ones_follow_them(hub, electra, labelled, tmp_path):
    student = CrossEncoder.from_backbone(str(electra), device="cpu")
    FineTune(student, steps=1, batch_size=2, verbose=False).fit(*labelled)
    student.push_to_hub("me/mine")
    CrossEncoder("me/mine", device="cpu").save(tmp_path / "again")
    (first,) = trainings(tmp_path / "again")
    assert "learned from: labels, 2 lists" in first
    head, text = parts(tmp_path / "again")
    assert head["base_model"] == "me/mine" and "- model: `me/mine`" in text
    further = CrossEncoder(str(tmp_path / "again"), device="cpu")
    for expected in (2, 3):  # train further, and save into the same folder
        Distil(further, steps=expected, batch_size=2, verbose=False).fit(labelled[0])
        further.save(tmp_path / "again")
        assert trainings(tmp_path / "again")[0] == first
        assert [f"steps={n}" in told for n, told in enumerate(trainings(tmp_path / "again"), 1)][1:] == [True] * (
            expected - 1
        )


def test_what_another_s_card_says_of_training_is_not_taken_over(hub, cross_encoder_folder, tmp_path):
    files = {file.name: file.read_bytes() for file in cross_encoder_folder.iterdir()}
    hub.create("someone/reranker")
    hub.commit("someone/reranker", "main", files | {CARD: b"# theirs\n\n## Training\n\nlong\n\n## Use\n"}, "all")
    CrossEncoder("someone/reranker", device="cpu").save(tmp_path)
    assert "## Training" not in parts(tmp_path)[1]


def test_the_card_of_a_checkpoint_of_the_hub_names_it(hub, cross_encoder_folder, tmp_path):
    hub.create("someone/reranker")
    files = {file.name: file.read_bytes() for file in cross_encoder_folder.iterdir()}
    commit = hub.commit("someone/reranker", "main", files, "all")
    CrossEncoder("someone/reranker", revision=commit, device="cpu").save(tmp_path)
    head, text = parts(tmp_path)
    assert head["base_model"] == "someone/reranker"
    assert f"- model: `someone/reranker`\n- revision: `{commit}`" in text


def test_license_and_language_of_an_earlier_card_stay_here_and_on_the_hub(hub, cross_encoder_folder, tmp_path):
    reranker = CrossEncoder(str(cross_encoder_folder), device="cpu")
    reranker.save(tmp_path / "mine")
    card = tmp_path / "mine" / CARD
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\nlanguage: en\nbase_model: a/b\n", 1) + "old")
    reranker.save(tmp_path / "mine")
    head, text = parts(tmp_path / "mine")
    assert (head["license"], head["language"]) == ("mit", "en") and "base_model" not in head and "old" not in text
    hub.create("me/mine")
    hub.commit("me/mine", "main", {CARD: card.read_bytes() + b"old"}, "mine")
    reranker.push_to_hub("me/mine")
    pushed = hub.at("me/mine")[1][CARD].decode()
    assert "license: mit" in pushed and "old" not in pushed
