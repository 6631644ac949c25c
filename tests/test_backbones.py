"""from_backbone: every kind of encoder becomes a student that learns and is saved. After loading, also with
sentence-transformers, it scores the same."""

import json
import shutil

import pandas as pd
import pytest
import sentence_transformers
import torch
import transformers
from conftest import T5
from test_classifiers import ENDED, SIZE, SPECIAL, words

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score
from pyterrier_lit.training import Distil, losses

BODY = {name: value for name, value in SIZE.items() if name != "num_labels"} | {"pad_token_id": 3}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "initializer_range": 0.5, "pad_token_id": 3}
KINDS = {
    "electra": ("ElectraModel", BODY | {"embedding_size": 16}),
    "bert": ("BertForMaskedLM", BODY),  # such as MiniLM
    "roberta": ("RobertaModel", BODY | {"type_vocab_size": 1, "max_position_embeddings": 80}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BODY | {"type_vocab_size": 1, "max_position_embeddings": 80}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "deberta-v2": ("DebertaV2Model", BODY | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": ("ModernBertForMaskedLM", BODY | {"cls_token_id": 1, "sep_token_id": 2}),
}
PASSAGES = ["a cat is an animal", "dogs bark", "the sky", "cats and dogs", "a"]


@pytest.fixture(params=KINDS)
def encoder(request, tmp_path):
    """The folder of a small random encoder."""
    architecture, fields = KINDS[request.param]
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if request.param in ("electra", "bert") else [])]
    tokenizer = words(SPECIAL, *ENDED, pad_token="<pad>", model_input_names=inputs)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **fields, vocab_size=len(tokenizer))
    getattr(transformers, architecture)(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_student_over_it_learns_and_is_saved(encoder, tmp_path):
    torch.manual_seed(1)
    student = CrossEncoder.from_backbone(str(encoder), device="cpu")
    assert student.lengths() == {"query_length": 32, "doc_length": 256}
    before = student.score(["cat"], [PASSAGES])[0]
    frame = pd.DataFrame({"qid": "1", "query": "cat", "docno": list("abcde"), "text": PASSAGES, "rank": range(5)})
    settings = {"steps": 12, "batch_size": 1, "learning_rate": 3e-3, "verbose": False}
    Distil(student, **settings).fit(frame.assign(score=-frame["rank"]), None)
    after = student.score(["cat"], [PASSAGES])[0]

    def loss(scores):
        return losses.ranknet(torch.tensor([scores]), torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])).item()

    assert loss(after) < loss(before) and max(after) - min(after) > 0.1
    student.save(tmp_path / "saved")
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert again.score(["cat"], [PASSAGES])[0] == pytest.approx(after, abs=2e-5)
    assert again.lengths() == student.lengths()
    student.save(tmp_path / "other", layout="transformers")
    other = sentence_transformers.CrossEncoder(str(tmp_path / "other"), device="cpu")
    pairs = [("cat", passage) for passage in PASSAGES]
    assert other.predict(pairs).tolist() == pytest.approx(after, abs=2e-5)


def test_its_body_is_the_pre_trained_one_and_its_head_follows_the_seed(encoder):
    def begun(seed):
        torch.manual_seed(seed)
        return CrossEncoder.from_backbone(str(encoder), device="cpu").load().network.state_dict()

    first, second, other = begun(1), begun(1), begun(2)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    differ = [name for name, tensor in first.items() if not torch.equal(tensor, other[name])]
    own = transformers.AutoModel.from_pretrained(encoder).state_dict()
    assert differ and not [name for name in differ if any(name.endswith(known) for known in own)]


def test_a_body_without_its_weights_or_without_a_class_is_refused(encoder, copy_config):
    with pytest.raises(ValueError, match="no-such"):
        CrossEncoder.from_backbone(str(copy_config(encoder, model_type="no-such")), device="cpu")


@pytest.fixture
def copy_config(tmp_path):
    def change(folder, **fields):
        shutil.copytree(folder, tmp_path / "changed")
        file = tmp_path / "changed" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return tmp_path / "changed"

    return change


@pytest.mark.parametrize("kind", [LiT5Distill, LiT5Score])
def test_an_mt5_is_a_backbone_of_the_lit5s(kind, copy_config, tmp_path):
    folder = copy_config(T5, model_type="mt5", architectures=["MT5ForConditionalGeneration"])
    wanted = kind.from_backbone(str(T5), device="cpu").score(["vika"], [["votodo repi", "sena", "ge"]])
    student = kind.from_backbone(str(folder), device="cpu")
    assert student.score(["vika"], [["votodo repi", "sena", "ge"]]) == wanted
    student.save(tmp_path / "saved")
    assert kind(str(tmp_path / "saved"), device="cpu").score(["vika"], [["votodo repi", "sena", "ge"]]) == wanted
