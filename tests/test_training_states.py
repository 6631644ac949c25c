"""Training of all four rerankers: bfloat16, validation, resuming, the training folder, copies of students, saving."""

import copy
import pickle
import shutil
import warnings
from itertools import pairwise

import pandas as pd
import pyterrier as pt
import pytest
import safetensors.torch
import torch
import transformers
from conftest import RERANKERS, T5
from pyterrier.measures import nDCG

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.models.text_encoder import TextEncoder
from pyterrier_lit.training import Distil, FineTune, distil
from pyterrier_lit.training.trainer import _last_whole

OWN = {LiT5Distill: {"largest": 4}, PERank: {"largest": 4}, CrossEncoder: {}, LiT5Score: {}}  # more settings


@pytest.fixture
def candidates():
    rows = [
        (f"q{q}", f"query {q}", f"d{q}{i}", f"text {i} of {q}", 9.0 - i, i, "one") for q in range(3) for i in range(5)
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank", "answers"])


@pytest.fixture
def qrels():
    return pd.DataFrame({"qid": ["q0", "q1", "q2"], "docno": ["d03", "d14", "d22"], "label": 1})


@pytest.fixture(params=RERANKERS.values(), ids=RERANKERS)
def known(request):
    return request.param


def new(known, **arguments):
    return known.kind(**{"model": str(known.random), "device": "cpu"} | arguments)


@pytest.fixture
def encoder(cross_encoder_folder):
    return lambda **arguments: CrossEncoder(**{"model": str(cross_encoder_folder), "device": "cpu"} | arguments)


def learning(student, teaches=FineTune, **settings):
    few = {"steps": 2, "batch_size": 1, "learning_rate": 1e-2, "warmup": 0, "verbose": False}
    return teaches(student, **few | OWN[type(student)] | settings)


def weights(student):
    return {name: tensor.clone() for name, tensor in student.load().network.state_dict().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Killed(BaseException):
    """Raised by a step, to interrupt training."""


@pytest.fixture
def killed(monkeypatch):
    """killed(learner, after, *frames): call `learner.fit(*frames)`, and interrupt it after `after` steps."""

    def fit(learner, after, *frames):
        step, done = transformers.Trainer.training_step, []

        def counted(*arguments, **options):
            done.append(1)
            if len(done) > after:
                raise Killed
            return step(*arguments, **options)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(transformers.Trainer, "training_step", counted)
            learner.fit(*frames)

    return fit


# bfloat16, validation, resuming


def test_in_bfloat16_each_is_measured_and_resumes_to_the_same_end(known, candidates, qrels, killed, tmp_path):
    frames = candidates, qrels, candidates, qrels
    whole = learning(new(known), precision="bfloat16", every=1)
    whole.fit(*frames)
    assert len(whole.log["nDCG@10"].dropna()) == 2
    settings = {"precision": "bfloat16", "every": 1, "folder": tmp_path}
    killed(learning(new(known), **settings), 1, *frames)
    again = learning(new(known), **settings)
    again.fit(*frames)
    assert equal(weights(again.student), weights(whole.student))
    assert not equal(weights(again.student), weights(new(known)))


def test_in_bfloat16_each_learns_without_validation_also_if_it_was_read_for_inference(known, candidates, qrels):
    student = new(known, dtype="bfloat16")
    with torch.inference_mode():
        student(candidates)
    before = weights(student)
    learning(student, precision="bfloat16", steps=1).fit(candidates, qrels)
    assert {tensor.dtype for tensor in student.load().network.parameters()} == {torch.bfloat16}
    assert not equal(weights(student), before)


def test_the_encoder_of_a_pe_rank_is_frozen_and_reads_as_it_does_for_ranking(candidates, monkeypatch, capfd):
    student, seen = new(RERANKERS["PERank"], dtype="bfloat16", verbose=True), []
    encode = TextEncoder.encode

    def watched(encoder, batch):
        dtypes = {weight.dtype for weight in encoder.network.parameters()}
        seen.append((encoder.network.training, dtypes, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return encode(encoder, batch)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    learning(student, Distil, precision="bfloat16").fit(candidates, None)
    assert len(seen) == 3 and all(each == (False, {torch.bfloat16}, False, False) for each in seen)
    assert "passage" not in capfd.readouterr().err  # no progress bar of the encoder
    checkpoint = student.load()
    for name, weight in checkpoint.encoder.network.named_parameters():
        assert torch.equal(weight, checkpoint.encoder_weights[name].bfloat16()), name


def test_tables_that_are_no_weights_keep_their_dtype():
    known = RERANKERS["PERank"]
    student, before = new(known, dtype="bfloat16"), new(known, dtype="bfloat16")
    frame = pd.DataFrame({"qid": "1", "query": "q", "docno": list("abc"), "text": ["x", "y", "z"], "rank": range(3)})
    learning(student, Distil, steps=1).fit(frame, None)
    changed = copy.copy(student)
    changed.dtype = "float32"
    for learned in (student, changed):
        for name, table in before.load().network.named_buffers():
            assert torch.equal(dict(learned.load().network.named_buffers())[name], table), name


def test_a_student_begun_under_inference_mode_can_learn(electra):
    with torch.inference_mode():
        student = CrossEncoder.from_backbone(str(electra), device="cpu")
    assert not any(tensor.is_inference() for tensor in student.load().network.state_dict().values())


def test_dropout_is_on_again_after_a_measurement(encoder, candidates, qrels, monkeypatch):
    modes, student = [], encoder()
    scores = student.load().scores
    monkeypatch.setattr(
        student.load(), "scores", lambda inputs: modes.append(student.load().network.training) or scores(inputs)
    )
    learning(student, steps=3, every=1).fit(candidates, qrels, candidates, qrels)
    steps = [modes[0], *(now for before, now in pairwise(modes) if now != before)]
    assert steps == [True, False] * 3


# Validation


def test_a_measurement_uses_the_usual_attention_and_training_the_fast_one(encoder, candidates, qrels, monkeypatch):
    used, student = set(), encoder()
    network, scores = student.load().network, student.load().scores
    usual = network.body.config._attn_implementation

    def noted(inputs):
        used.add((network.training, network.body.config._attn_implementation))
        return scores(inputs)

    monkeypatch.setattr(student.load(), "scores", noted)
    learning(student, steps=2, every=1).fit(candidates, qrels, candidates, qrels)
    assert used == {(True, "eager"), (False, usual)} and usual != "eager"
    assert network.body.config._attn_implementation == usual


def test_the_measured_ndcg_is_that_of_an_experiment_on_the_same_queries(encoder, candidates, qrels):
    judged = pd.concat([qrels, pd.DataFrame({"qid": ["train"], "docno": ["d99"], "label": [1]})])
    valid = candidates[candidates.qid != "q2"]
    first, topics = pt.Transformer.from_df(valid), valid[["qid", "query"]].drop_duplicates()
    student = encoder(dtype="bfloat16")
    training = learning(student, precision="float32", steps=1, every=1)
    training.fit(candidates, qrels, valid, judged)
    table = pt.Experiment([first >> training], topics, judged, [nDCG @ 10])
    assert training.log["nDCG@10"].dropna().tolist() == table["nDCG@10"].tolist()
    numbers = valid.assign(qid=valid.qid.str[1:].astype(int), docno=valid.docno.str[1:].astype(int))
    text = judged.iloc[:2].assign(qid=["0", "1"], docno=["3", "14"])
    for frame, labels in ((numbers, text), (numbers.astype({"qid": "str", "docno": "str"}), text.astype(int))):
        assert distil.ndcg_at_10(student, frame, distil.judgements(frame, labels)) == table["nDCG@10"][0]


def test_it_is_measured_in_the_dtype_in_which_it_will_rank(encoder, candidates):
    student, expected = encoder(dtype="bfloat16"), encoder(dtype="bfloat16")(candidates)
    learns = student.load().network.float()
    pd.testing.assert_frame_equal(student.in_its_dtype()(candidates), expected)
    assert {weight.dtype for weight in learns.parameters()} == {torch.float32}
    assert student.in_its_dtype() is not student
    assert (plain := encoder()).in_its_dtype() is plain


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda f, q: (f.assign(docno=f.docno + "%p0"), q), ValueError, "none of the 15 validation passages"),
        (lambda f, q: (f, q.assign(qid="test-" + q.qid)), ValueError, "none of the 15 validation passages"),
        (lambda f, q: (f, q.assign(label=0)), ValueError, "none of the 15 validation passages"),
        (lambda f, q: (f.head(0), q), ValueError, "none of the 0 validation passages"),
        (lambda f, q: (f, q.assign(label=0.5)), ValueError, "label 0.5; wanted whole numbers"),
        (lambda f, q: (f, q.assign(label=float("nan"))), ValueError, "no number for qid 'q0', docno 'd03'"),
        (lambda f, q: (f, q.drop(columns="label")), ValueError, "no column 'label' in the qrels"),
        (lambda f, q: (f.assign(text=None), q), TypeError, "'text' of row 0"),
        (lambda f, q: (f.drop(columns="text"), q), pt.validate.InputValidationError, "text"),
        (lambda f, q: (f, None), ValueError, "has only one of the last two"),
        (lambda f, q: (None, q), ValueError, "has only one of the last two"),
    ],
)
def test_nothing_is_learned_before_a_bad_validation_set_is_noticed(
    encoder, candidates, qrels, monkeypatch, change, error, words
):
    monkeypatch.setattr(distil, "train", lambda *_, **__: pytest.fail("it learned"))
    student = encoder(model="no/such-model")  # the checkpoint is not even looked for
    with pytest.raises(error, match=words):
        learning(student).fit(candidates, qrels, *change(candidates, qrels))


# Folders


def test_a_folder_is_refused_to_other_data_and_other_weights(encoder, candidates, qrels, tmp_path):
    def fit(frame=candidates, labels=qrels, valid=candidates, student=None, **settings):
        learner = learning(student or encoder(), folder=tmp_path, **settings)
        learner.fit(frame, labels, valid, qrels)
        return learner.student

    done = fit()
    assert equal(weights(fit()), weights(done))
    other = encoder()
    learning(other).fit(candidates, qrels)
    fresh = encoder(model=other.model)
    fresh.load().network.load_state_dict(weights(other))
    for what, name in (
        ({"labels": qrels.assign(docno=["d02", "d14", "d22"])}, "digest of lists and targets"),
        ({"frame": candidates.assign(text=candidates.text + ".")}, "digest of lists and targets"),
        ({"valid": candidates.head(10)}, "digest of the validation"),
        ({"student": fresh}, "digest of the starting weights"),
        ({"student": encoder(doc_length=9)}, "student"),
    ):
        with pytest.raises(
            ValueError, match=rf"has checkpoints of training with another {name} \(.*; now .*\): give another folder"
        ):
            fit(**what)


def test_vectors_are_part_of_the_data():
    vectors = torch.arange(8.0).view(2, 4)
    lists = [("1", "q", {"doc_vec": list(vectors.numpy())})]
    assert distil.digest(lists) == distil.digest([("1", "q", {"doc_vec": list(vectors)})])
    assert distil.digest(lists) != distil.digest([("1", "q", {"doc_vec": list((vectors + 1).numpy())})])


def test_a_training_that_was_stopped_resumes_in_the_same_process(encoder, candidates, qrels, killed, tmp_path):
    whole, student = encoder(), encoder()
    learning(whole, steps=4, every=1).fit(candidates, qrels)
    learner = learning(student, steps=4, every=1, folder=tmp_path)
    killed(learner, 3, candidates, qrels)
    learner.fit(candidates, qrels)
    assert equal(weights(student), weights(whole))


def test_the_last_whole_state_is_taken(encoder, candidates, qrels, tmp_path):
    settings = {"steps": 3, "every": 1, "folder": tmp_path / "state"}
    done = learning(encoder(), **settings)
    done.fit(candidates, qrels)
    last, before = (tmp_path / "state" / f"checkpoint-{step}" for step in (3, 2))
    assert _last_whole(tmp_path / "state") == str(last)
    for file in sorted(path for path in last.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert _last_whole(tmp_path / "state") == str(before), file
        file.unlink()
        assert _last_whole(tmp_path / "state") == str(before), file
        file.write_bytes(whole)
    (last / "optimizer.pt").unlink()
    again = learning(encoder(), **settings)
    again.fit(candidates, qrels)
    assert equal(weights(again.student), weights(done.student))
    assert _last_whole(tmp_path / "state") == str(last)
    shutil.rmtree(last), shutil.rmtree(before)
    assert _last_whole(tmp_path / "state") is None and _last_whole(tmp_path / "nowhere") is None


def test_a_folder_that_was_moved_keeps_its_best_state(encoder, candidates, qrels, tmp_path, monkeypatch):
    measured = iter([0.9, 0.1])
    monkeypatch.setattr(distil, "ndcg_at_10", lambda *_: next(measured))
    frames, settings = (candidates, qrels, candidates, qrels), {"steps": 2, "every": 1}
    first, moved = encoder(), encoder()
    learning(first, **settings, folder=tmp_path / "here").fit(*frames)
    (tmp_path / "here").rename(tmp_path / "there")
    learning(moved, **settings, folder=tmp_path / "there").fit(*frames)
    assert equal(weights(moved), weights(first))


def test_lora_resumes_to_the_same_end_and_what_failed_leaves_no_trace(backbone, candidates, killed, tmp_path):
    pytest.importorskip("peft", reason="needs peft, of the extra lora")

    folder = backbone("mistral")

    def build():
        torch.manual_seed(0)
        return PERank.from_backbone(folder, embedding_size=8, device="cpu", window_size=6, stride=3)

    given = candidates.assign(doc_vec=list(torch.randn(len(candidates), 8).numpy()))
    settings = {"lora": 2, "text_weight": 0.0, "steps": 4, "every": 1, "batch_size": 2, "learning_rate": 1e-2}
    settings |= {"verbose": False, "micro_batch": 2}
    whole, stopped, other = build(), build(), build()
    Distil(whole, **settings).fit(given)
    before = weights(stopped)
    killed(Distil(stopped, folder=tmp_path, **settings), 3, given)
    kept = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all("lora_" in name or "projector" in name for name in kept)
    assert weights(stopped).keys() == before.keys()
    assert equal(*({k: v for k, v in w.items() if k.startswith("body.")} for w in (weights(stopped), before)))
    Distil(other, folder=tmp_path, **settings).fit(given)
    assert equal(weights(other), weights(whole)) and not equal(weights(other), before)


# What was learned is kept


def test_another_dtype_device_or_setting_keeps_what_was_learned(known, candidates, qrels):
    student, before = new(known), new(known)(candidates)
    learning(student).fit(candidates, qrels)
    learned = student(candidates)
    assert learned.score.tolist() != before.score.tolist()
    for name, value in (("device", torch.device("cpu")), ("dtype", "float32"), ("special_tokens", "text")):
        if hasattr(student, name):
            changed = copy.copy(student)
            setattr(changed, name, value)
            for each in (changed, pickle.loads(pickle.dumps(changed))):
                pd.testing.assert_frame_equal(each(candidates), learned)
            changed = pt.inspect.transformer_apply_attributes(student, **{name: value})
            pd.testing.assert_frame_equal(changed(candidates), learned)
    changed = copy.copy(student)
    changed.dtype = "bfloat16"
    rounded = {name: tensor.bfloat16().float() for name, tensor in student.load().network.named_parameters()}
    assert equal({name: t.float() for name, t in changed.load().network.named_parameters()}, rounded)
    for each in (changed, pt.inspect.transformer_apply_attributes(student, device=torch.device("cpu"))):
        for weight in each.load().network.parameters():
            weight.data.zero_()
    pd.testing.assert_frame_equal(student(candidates), learned)
    student.model = "no/such-model"
    with pytest.raises(FileNotFoundError):
        student(candidates)


def test_an_unknown_argument_is_named(encoder):
    with pytest.raises(pt.inspect.InspectError, match="CrossEncoder has no argument colour"):
        pt.inspect.transformer_apply_attributes(encoder(), colour="red")


def test_a_second_fit_goes_on_from_the_first(encoder, candidates, qrels):
    student = encoder()
    learning(student, steps=1).fit(candidates, qrels)
    first = weights(student)
    learning(student, steps=1).fit(candidates, qrels)
    again = encoder()
    again.load().network.load_state_dict(first)
    learning(again, steps=1).fit(candidates, qrels)
    assert equal(weights(student), weights(again)) and not equal(weights(student), first)


def test_a_trained_student_says_so_and_is_like_no_other(encoder, candidates, qrels, tmp_path):
    students, published = [encoder(), encoder()], repr(encoder())
    for student in students:
        learning(student, steps=1).fit(candidates, qrels)
        assert repr(student).startswith(f"{published} <trained in memory, not saved: ")
    one, other = students
    assert len({repr(one), repr(other), published}) == 3 and hash(one) != hash(other)
    assert repr(copy.copy(one)) == repr(pickle.loads(pickle.dumps(one))) == repr(one)
    trained = repr(one)
    one.save(tmp_path)
    assert repr(one) == trained.replace("not saved", f"saved as {str(tmp_path)!r}")
    learning(one, steps=1).fit(candidates, qrels)
    assert "not saved" in repr(one) and repr(one) != trained
    one.model = "a/b"
    assert repr(one) == "CrossEncoder('a/b', device='cpu')"


def test_a_fit_that_is_refused_leaves_the_student_as_it_was(encoder, candidates, qrels, tmp_path):
    student = encoder()
    learning(student, steps=1).fit(candidates, qrels)
    student.save(tmp_path)
    trained = repr(student)
    with pytest.raises(ValueError, match="a multiple of micro_batch"):
        learning(student, steps=1, batch_size=3, micro_batch=2).fit(candidates, qrels)
    assert repr(student) == trained


# In pipelines


def test_a_pipeline_compiled_before_fit_trains_the_student_that_it_ranks_with(candidates, qrels):
    student = LiT5Distill(str(T5), window_size=6, device="cpu")
    before = student(candidates)["score"].tolist()
    training = learning(student)
    pipeline = (pt.Transformer.from_df(candidates) >> training % 3).compile()
    topics = candidates[["qid", "query"]].drop_duplicates()
    pipeline.fit(topics, qrels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = pipeline(topics)
        assert training(candidates)["score"].tolist() == student(candidates)["score"].tolist() != before
    expected = student(candidates).query("rank < 3")
    assert set(zip(out.qid, out.docno, strict=True)) == set(zip(expected.qid, expected.docno, strict=True))
    assert len(training.log) > 0


def test_where_the_fit_of_a_pipeline_does_not_reach_a_warning_says_so(encoder, candidates, qrels):
    first, topics = pt.Transformer.from_df(candidates), candidates[["qid", "query"]].drop_duplicates()
    for teaches in (FineTune, Distil):
        training = learning(encoder(), teaches)
        pipeline = first >> (training + encoder())
        pipeline.fit(topics, qrels)
        with pytest.warns(UserWarning, match=f"{teaches.__name__} has not been fitted.*`[+]`, `[*][*]` or a cache"):
            pipeline(topics)
        with pytest.raises(AttributeError, match="no log before"):
            _ = training.log
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pt.inspect.transformer_outputs(training, ["qid", "query", "docno", "text"])
            training.fit(candidates, qrels)
            pipeline(topics)


# Saving


def test_what_lay_in_the_folder_before_does_not_matter(known, candidates, tmp_path):
    new(RERANKERS["CrossEncoder" if known.kind is PERank else "PERank"]).save(tmp_path)
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "modules.json"):
        (tmp_path / name).write_text('{"weight_map": {"a": "model-9.safetensors"}}')
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "results.json").write_text("mine")
    new(known).save(tmp_path)
    pd.testing.assert_frame_equal(new(known, model=str(tmp_path))(candidates), new(known)(candidates))
    assert (tmp_path / "results.json").read_text() == "mine"
    assert not list(tmp_path.glob("*index.json")) and not list(tmp_path.glob(".saving-*"))


def test_a_pe_rank_is_saved_with_its_encoder_whether_or_not_it_was_used(candidates, tmp_path):
    known = RERANKERS["PERank"]
    new(known).save(tmp_path / "saved")
    copied = shutil.move(tmp_path / "saved", tmp_path / "moved")  # away from the encoder's folder
    pd.testing.assert_frame_equal(new(known, model=str(copied))(candidates), new(known)(candidates))


def test_a_pe_rank_whose_encoder_is_not_to_be_had_is_saved_aloud(candidates, tmp_path):
    known = RERANKERS["PERank"]
    alone = shutil.copytree(known.random, tmp_path / "alone")
    frame = candidates.assign(
        doc_vec=[torch.ones(known.kind(str(known.random), device="cpu").load().embedding_size).numpy()]
        * len(candidates)
    )
    with pytest.warns(UserWarning, match="saved without the files of the encoder: "):
        new(known, model=str(alone)).save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(new(known, model=str(tmp_path / "saved"))(frame)) == len(frame)
