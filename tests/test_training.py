"""Training: equality with the references, what each student learns, resuming after a kill, pipelines, errors."""

import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import GOLDEN, RERANKERS
from pe import Encoder, Index, quietly

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank
from pyterrier_lit.decoding import first_scores
from pyterrier_lit.frames import Ranking, rankings
from pyterrier_lit.lit5_distill import identifiers
from pyterrier_lit.models.t5 import FiD, PieceReader
from pyterrier_lit.training import Distil, FineTune, cross_encoder, distil, lit5_distill, lit5_score, pe_rank
from pyterrier_lit.training.data import judgements
from pyterrier_lit.training.losses import weighted_ranknet
from pyterrier_lit.training.pe_rank import RankingRecipe
from pyterrier_lit.training.trainer import Recipe, Samples, Settings, train, training_arguments

LIT5, PE_RANK = GOLDEN / "lit5" / "tiny-random", GOLDEN / "pe_rank"
QUIET = {"verbose": False, "seed": 1}


@pytest.fixture
def candidates():
    """Eight queries with six passages each. A query is a letter. The relevant passage is the one that begins with this
    letter, and its rank varies."""
    letters = "abcdefgh"
    rows = [
        (f"q{q}", letter, f"{letter}{i}", f"{letter} is here" if i == q % 6 else f"nothing {i}", 6.0 - i)
        for q, letter in enumerate(letters)
        for i in range(6)
    ]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score"])


@pytest.fixture
def qrels():
    return pd.DataFrame(
        [(f"q{q}", f"{letter}{q % 6}", 1) for q, letter in enumerate("abcdefgh")], columns=["qid", "docno", "label"]
    )


@pytest.fixture
def student(electra):
    torch.manual_seed(0)
    return CrossEncoder.from_backbone(str(electra), device="cpu")


def losses(training):
    return training.log["loss"].dropna().tolist()


# The reference's numbers


@pytest.mark.parametrize("name", ["electra_bias_RankNet", "electra_bias_ApproxRankMSE", "bert_bias_InfoNCE"])
def test_five_steps_are_lightning_irs(name):
    reference = json.loads((GOLDEN / "cross_encoder" / f"train_{name}.json").read_text())
    encoder = CrossEncoder(str(GOLDEN / "cross_encoder" / reference["checkpoint"]), device="cpu")
    rows = [
        (f"{q}", query, f"{q}-{i}", text, -i, target)
        for q, (query, texts, targets) in enumerate(
            zip(reference["queries"], reference["docs"], reference["targets"], strict=True)
        )
        for i, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "target"])
    training = Distil(
        encoder,
        frame.assign(score=frame.target)[["qid", "docno", "score"]],
        loss={"RankNet": "ranknet", "ApproxRankMSE": "adr_mse", "InfoNCE": "lce"}[reference["loss"]],
        learning_rate=reference["lr"],
        batch_size=6,
        micro_batch=6,
        steps=5,
        clip=1e9,  # clips nothing, but with 0 the Trainer logs no norms
        **QUIET,
    )
    training.fit(frame, None)
    assert losses(training) == pytest.approx([step["loss"] for step in reference["history"]], abs=1e-5)
    assert training.log["grad_norm"].tolist() == pytest.approx(
        [step["grad_norm"] for step in reference["history"]], rel=1e-4
    )
    scores, expected = encoder(frame)["score"].to_numpy(), np.array(reference["final_scores"])
    assert np.abs(scores - scores.mean() - expected + expected.mean()).max() < 1e-5


def taught(row, query):
    worth = dict(zip(row["ranking"], range(len(row["ranking"]), 0, -1), strict=True))
    n = len(worth)
    columns = {
        "docno": [str(i) for i in range(n)],
        "text": row["extra_texts"][:n],
        "target": [worth[i + 1] for i in range(n)],
    }
    return Ranking("q", query, columns)


def read_rows(name):
    return [json.loads(line) for line in (PE_RANK / f"{name}_rows.jsonl").read_text().splitlines()]


def test_pe_ranks_second_stage_is_the_references():
    arrays, rows = np.load(PE_RANK / "arrays.npz"), read_rows("stage2")
    recipe = pe_rank.RECIPES["pe-rank-ranking"].replace(reduction="mean", shuffle=0.0)
    student = PERank(str(PE_RANK / "checkpoint"), window_size=6, device="cpu")
    objective = recipe.objective(student)
    queries = [row["messages_wo_content"][0]["content"].split("search query: ")[1].split(".\n")[0] for row in rows]
    lists = objective.prepare([taught(row, query) for row, query in zip(rows, queries, strict=True)])
    batch = objective.collate([objective.sample(given, random.Random(0)) for given in lists])
    vectors = pe_rank.embedding(student)(batch.windows)
    for view, name in zip(batch.views, ("wo", "w"), strict=True):
        ids, mask = (
            arrays[f"stage2.inputs_{name}_content.input_ids"],
            arrays[f"stage2.inputs_{name}_content.attention_mask"],
        )
        assert view == [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
        expected = arrays[f"stage2.logits_{name}"]
        scores = pe_rank.rank_scores(student.load(), view, vectors, batch.orders)[0].detach().numpy()
        assert np.abs(scores - expected)[expected > -1e8].max() < 1e-4
    loss = objective.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["stage2.loss"]), abs=1e-5)
    network = objective.network
    for parameter, name in (
        (network.projector[0].weight, "projector_0_weight"),
        (network.projector[2].bias, "projector_2_bias"),
        (network.body.layers[0].self_attn.q_proj.weight, "q_proj_0"),
    ):
        assert np.abs(parameter.grad.numpy() - arrays[f"stage2.grad_{name}"]).max() < 1e-5


def test_pe_ranks_first_stage_is_the_references_and_only_the_projector_learns():
    arrays, rows = np.load(PE_RANK / "arrays.npz"), read_rows("stage1")
    objective = pe_rank.RECIPES["pe-rank-alignment"].objective(PERank(str(PE_RANK / "checkpoint"), device="cpu"))
    texts = [row["extra_texts"][0] for row in rows]
    batch = objective.collate(objective.prepare([Ranking("q", "x", {"docno": ["1", "2"], "text": texts})]))
    ids, mask = arrays["stage1.input_ids"], arrays["stage1.attention_mask"]
    assert batch.conversations == [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
    loss = objective.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["stage1.loss"]), abs=1e-5)
    gradient = objective.network.projector[0].weight.grad.numpy()
    assert np.abs(gradient - arrays["stage1.grad_projector_0_weight"]).max() < 1e-5
    learned = {name for name, parameter in objective.network.named_parameters() if parameter.requires_grad}
    assert learned == {f"projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


# Students learn


@pytest.fixture
def pe_rank_of(backbone):
    """pe_rank_of(): a small PE-Rank, with the same weights at each call."""

    def build():
        torch.manual_seed(0)
        return PERank.from_backbone(
            backbone("mistral"), embedding_size=8, device="cpu", window_size=6, stride=3, projector_type="linear"
        )

    return build


@pytest.fixture
def with_vectors(candidates):
    vectors = np.random.default_rng(0).normal(size=(len(candidates), 8)).astype("float32")
    return candidates.assign(doc_vec=list(vectors))


LORA = {"lora": 4, "text_weight": 0.0, "steps": 6, "batch_size": 4, "warmup": 0, "learning_rate": 1e-2, **QUIET}


def test_of_a_pe_rank_with_lora_adapters_and_projector_alone_learn_and_are_merged(pe_rank_of, with_vectors):
    pytest.importorskip("peft", reason="needs peft, of the extra lora")
    model, unmerged, learned = pe_rank_of(), [], []
    before = {name: tensor.clone() for name, tensor in model.load().network.state_dict().items()}
    objective = model_objective = RankingRecipe(**{k: v for k, v in LORA.items() if k not in QUIET}).objective(model)
    lists = objective.prepare(rankings(with_vectors.assign(target=-with_vectors["score"]), objective.column_sets))

    def look():
        network = model_objective.network
        learned.append({name for name, parameter in network.named_parameters() if parameter.requires_grad})
        for name, tensor in network.state_dict().items():
            plain = name.replace(".base_layer", "")
            if name.startswith("body.") and "lora_" not in name:
                assert torch.equal(tensor, before[plain]), name
        unmerged.append(model(with_vectors)["score"].tolist())
        model.load().network.train()
        return float(len(unmerged))

    recipe = RankingRecipe(**{k: v for k, v in LORA.items() if k not in QUIET})
    train(objective, lists, recipe, Settings(seed=1, every=3, verbose=False), validate=look)
    assert all("lora_" in name or name.startswith("projector.") for name in learned[0])
    assert any("lora_A" in name for name in learned[0]) and any("projector" in name for name in learned[0])
    assert model(with_vectors)["score"].tolist() == pytest.approx(unmerged[-1], abs=1e-5)
    after = model.load().network.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after if "q_proj" in name)


def test_lora_learns_the_same_with_gradient_checkpointing(pe_rank_of, with_vectors):
    pytest.importorskip("peft", reason="needs peft, of the extra lora")
    models = [pe_rank_of(), pe_rank_of()]
    for model, checkpointing in zip(models, (False, True), strict=True):
        Distil(model, checkpointing=checkpointing, **LORA | {"steps": 3}).fit(with_vectors)
    plain, recomputed = (model.load().network.state_dict() for model in models)
    before = pe_rank_of().load().network.state_dict()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(plain[name], before[name]) for name in plain if "q_proj" in name)


def test_lora_in_bfloat16_freezes_the_weights_as_they_are_and_learns_in_float32(pe_rank_of, with_vectors):
    pytest.importorskip("peft", reason="needs peft, of the extra lora")
    model, seen = pe_rank_of(), {}
    model.dtype = "bfloat16"
    model.load().network.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.load().network.state_dict().items()}
    recipe = RankingRecipe(
        **{k: v for k, v in LORA.items() if k not in QUIET}, checkpointing=True, precision="bfloat16"
    )
    objective = recipe.objective(model)
    lists = objective.prepare(rankings(with_vectors.assign(target=-with_vectors["score"]), objective.column_sets))

    def look():
        seen.update({name: (p.dtype, p.requires_grad) for name, p in objective.network.named_parameters()})
        return float(len(seen))

    log = train(objective, lists, recipe, Settings(seed=1, every=3, verbose=False), validate=look)
    learned = {name for name, (_, learns) in seen.items() if learns}
    assert all("lora_" in name or name.startswith("projector.") for name in learned) and any(
        "lora_" in n for n in learned
    )
    assert {seen[name][0] for name in learned} == {torch.float32}
    assert {dtype for name, (dtype, learns) in seen.items() if not learns} == {torch.bfloat16}
    after = model.load().network.state_dict()
    assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} <= {
        torch.bfloat16,
        torch.float32,
    }
    assert any(not torch.equal(after[name], before[name]) for name in after if "q_proj" in name)
    assert all(math.isfinite(row["loss"]) for row in log if "loss" in row)


@pytest.mark.parametrize("loss", cross_encoder.LOSSES)
def test_a_cross_encoder_learns_by_every_loss(student, candidates, qrels, loss):
    training = FineTune(
        student,
        loss=loss,
        steps=60,
        batch_size=8,
        micro_batch=4,
        learning_rate=3e-3,
        n_passages=None,
        sampling="top",
        **QUIET,
    )
    training.fit(candidates, qrels)
    first = training(candidates).query("rank == 0")
    assert (first.docno.str[1].astype(int) == first.qid.str[1].astype(int) % 6).mean() > 0.8
    assert losses(training)[-1] < losses(training)[0]


def test_lists_of_unequal_length_learn_as_they_do_alone(student, candidates, qrels):
    """With the loss lce, each query counts the same: the loss of a batch is the mean of its queries' losses."""
    recipe = cross_encoder.RECIPES["rank-distillm-rankings"].replace(loss="lce")
    objective = recipe.objective(student)
    frame = candidates.merge(qrels.rename(columns={"label": "target"}), how="left").fillna({"target": 0})
    frame = frame.drop(frame.index[[8, 9, 27]])
    lists = objective.prepare(rankings(frame, objective.column_sets))
    examples = [objective.sample(given, random.Random(0)) for given in lists]
    together = objective.loss(objective.collate(examples))
    apart = [objective.loss(objective.collate([example])).item() for example in examples]
    assert together.item() == pytest.approx(np.mean(apart), abs=1e-6)
    small = recipe.replace(max_tokens=16).objective(student)
    assert small.loss(small.collate(examples)).item() == pytest.approx(together.item(), abs=1e-6)


def test_a_lit5_distill_learns_the_order(candidates, tmp_path):
    model = LiT5Distill(str(LIT5), window_size=6, device="cpu")
    backwards = pt.apply.doc_score(lambda row: int(row["docno"][1:]))
    settings = {
        "steps": 40,
        "batch_size": 8,
        "micro_batch": 8,
        "warmup": 0,
        "learning_rate": 1e-2,
        "smallest": 6,
        "shuffle": 0.0,
    }
    pipeline = pt.Transformer.identity() >> Distil(model, backwards, dropout=0.0, **settings, **QUIET)
    pipeline.fit(candidates, None)
    expected = {f"q{q}": [f"{letter}{i}" for i in (5, 4, 3, 2, 1, 0)] for q, letter in enumerate("abcdefgh")}
    ranked = {qid: ranking.sort_values("rank").docno.tolist() for qid, ranking in pipeline(candidates).groupby("qid")}
    assert ranked == expected
    model.save(tmp_path)
    loaded = LiT5Distill(str(tmp_path), device="cpu")
    assert loaded.window() == (6, 3)
    pd.testing.assert_frame_equal(loaded(candidates), pipeline(candidates))


def test_the_loss_of_the_first_step_is_that_of_the_scores_that_first_orders_by():
    """Some identifiers of the first window have two tokens. All identifiers of the second window have one token."""
    model = LiT5Distill(str(LIT5), window_size=70, device="cpu")
    chance, checkpoint = random.Random(1), model.load()
    windows = [[f"passage {i} {chance.random()}" for i in range(n)] for n in (70, 9)]
    orders = [chance.sample(range(n), n) for n in (70, 9)]
    recipe = lit5_distill.RECIPES["lit5-distill-first"].replace(dropout=0.0)
    objective = recipe.objective(model)
    examples = [lit5_distill.OrderExample("q", *both) for both in zip(windows, orders, strict=True)]
    batch = objective.collate(examples)
    total = objective.loss(batch)
    total.backward()
    text = recipe.replace(first_weight=0.0).objective(model).loss(batch)
    words, pieces = identifiers(checkpoint, 70)
    with torch.inference_mode():
        scores, inside = first_scores(PieceReader(FiD(checkpoint.network), batch.prompts, pieces, 2), words, [70, 9])
        targets = torch.tensor([[-(o.index(i) if i < len(o) else 99) for i in range(70)] for o in orders])
        expected = weighted_ranknet(scores, targets, inside)
    assert ((total - text) / recipe.first_weight).item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in objective.network.parameters())


def test_a_lit5_distill_learns_to_order_by_its_first_step(candidates):
    model = LiT5Distill(str(LIT5), window_size=6, decoding="first", device="cpu")
    backwards = pt.apply.doc_score(lambda row: int(row["docno"][1:]))
    training = Distil(
        model,
        backwards,
        recipe="lit5-distill-first",
        steps=25,
        batch_size=8,
        micro_batch=8,
        warmup=0,
        learning_rate=1e-2,
        smallest=6,
        shuffle=0.0,
        dropout=0.0,
        **QUIET,
    )
    training.fit(candidates, None)
    ranked = training(candidates).sort_values("rank").groupby("qid").docno.agg(lambda ids: "".join(d[1] for d in ids))
    assert set(ranked) == {"543210"}


def test_a_lit5_score_learns_the_answer(candidates):
    model = LiT5Score(str(LIT5), device="cpu", answer_field="answer", answer_length=8)
    answers = candidates.qid.map(lambda qid: ["one", "one "] if int(qid[1:]) % 2 else "ten")
    training = FineTune(
        model, steps=45, batch_size=8, micro_batch=8, warmup=0, learning_rate=2e-2, dropout=0.0, **QUIET
    )
    training.fit(candidates.assign(answers=answers))
    said = training(candidates).drop_duplicates("qid").set_index("qid")["answer"].str.strip()
    assert losses(training)[-1] < 0.5 < losses(training)[0]
    assert set(said) <= {"one", "ten"}


def test_a_pe_rank_learns_in_both_stages(backbone, candidates):
    torch.manual_seed(0)
    model = PERank.from_backbone(backbone("mistral"), embedding_size=8, device="cpu", window_size=6, stride=3)
    vectors = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    frame = candidates.assign(doc_vec=[vectors[int(docno[1:])] for docno in candidates.docno])
    before = [parameter.clone() for parameter in model.load().network.body.parameters()]
    align = FineTune(
        model, recipe="pe-rank-alignment", steps=10, batch_size=4, micro_batch=4, learning_rate=1e-2, **QUIET
    )
    align.fit(frame)
    assert losses(align)[-1] < losses(align)[0]
    assert all(torch.equal(old, new) for old, new in zip(before, model.load().network.body.parameters(), strict=True))
    rank = Distil(
        model,
        pt.apply.doc_score(lambda row: int(row["docno"][1:])),
        steps=30, batch_size=8, warmup=0, learning_rate=5e-3, **QUIET,
    )  # fmt: skip
    rank.fit(frame)
    assert losses(rank)[-1] < 0.7 * losses(rank)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (rank(frame).query("rank == 0").docno.str[1] == "5").mean() > 0.8
    assert all(parameter.grad is None or parameter.requires_grad for parameter in model.load().network.parameters())


def test_gradient_checkpointing_of_the_passages_changes_no_gradient(candidates):
    frame = candidates.assign(target=range(len(candidates)))
    gradients = []
    for checkpointing in (False, True):
        objective = (
            lit5_distill.RECIPES["lit5-distill-v2"]
            .replace(dropout=0.0, shuffle=0.0, smallest=6, checkpointing=checkpointing)
            .objective(LiT5Distill(str(LIT5), window_size=6, device="cpu"))
        )
        objective.network.train()
        lists = objective.prepare(rankings(frame, objective.column_sets))
        batch = objective.collate([objective.sample(given, random.Random(0)) for given in lists[:3]])
        objective.loss(batch).backward()
        gradients.append(objective.network.shared.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_windows_of_unequal_length_cost_together_what_they_cost_alone(candidates):
    """For the shorter window, the decoder must not attend to the padding."""
    recipe = lit5_distill.RECIPES["lit5-distill-v2"].replace(dropout=0.0)
    objective = recipe.objective(LiT5Distill(str(LIT5), window_size=6, device="cpu"))
    examples = [
        lit5_distill.OrderExample("a", ["a", "a b"], [1, 0]),
        lit5_distill.OrderExample("b", ["a long passage " * 4, "and another " * 3], [0, 1]),
    ]
    together = objective.loss(objective.collate(examples)).item()
    alone = [objective.loss(objective.collate([example])).item() for example in examples]
    assert together == pytest.approx(sum(alone) / 2, abs=1e-5)


def test_the_target_text_of_a_window_names_the_best_first():
    model = LiT5Distill(str(LIT5), window_size=20, device="cpu")
    objective = lit5_distill.RECIPES["lit5-distill-v2"].objective(model)
    batch = objective.collate([lit5_distill.OrderExample("q", ["x", "y", "z"], [2, 0, 1])])
    ((prompts, answer),) = zip(batch.prompts, batch.answers, strict=True)
    assert model.load().pieces.decode(answer[:-1]) == "3 1 2" and answer[-1] == 1
    assert prompts == model.prompts("q", ["x", "y", "z"])


def test_an_answer_is_as_long_as_the_student_may_write():
    model = LiT5Score(str(LIT5), answer_length=5, n_passages=2, device="cpu")
    objective = lit5_score.RECIPES["fid-reader"].objective(model)
    given = Ranking("q", "q", {"text": ["x", "y", "z"], "answers": ["a b c d e f g"] * 3})
    batch = objective.collate([objective.sample(given, random.Random(0))])
    ((prompts, answer),) = zip(batch.prompts, batch.answers, strict=True)
    assert len(prompts) == 2 and len(answer) == 4 and answer[-1] == 1


# The training loop


def list_and_number(given, rng):
    return given, rng.random()


def test_example_number_i_is_always_the_same_and_an_epoch_holds_every_list_once():
    samples = Samples(list_and_number, "abcde", 20, seed=3)
    assert (
        [samples[i] for i in reversed(range(20))][::-1]
        == [samples[i] for i in range(20)]
        == [pickle.loads(pickle.dumps(samples))[i] for i in range(20)]
    )
    epochs = ["".join(samples[i][0] for i in range(start, start + 5)) for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list("abcde") for epoch in epochs) and len(set(epochs)) > 1
    assert len({samples[i][1] for i in range(20)}) == 20
    assert [Samples(list_and_number, "abcde", 20, seed=4)[i] for i in range(20)] != [samples[i] for i in range(20)]


SCRIPT = """
    import sys, time, pandas as pd, torch
    torch.set_num_threads(1)
    from pyterrier_lit import CrossEncoder
    from pyterrier_lit.training import FineTune
    frame, qrels, model, folder, pause = sys.argv[1:]
    student = CrossEncoder(model, device="cpu")
    if float(pause):
        score = student.load().scores
        student.load().scores = lambda inputs: time.sleep(float(pause)) or score(inputs)
    training = FineTune(student, folder=folder, every=4, steps=24, batch_size=4, learning_rate=1e-3, verbose=False)
    training.fit(pd.read_pickle(frame), pd.read_pickle(qrels))
    print(training.log["loss"].tolist()[-1], student(pd.read_pickle(frame))["score"].tolist())
"""


def test_a_killed_training_goes_on_to_the_same_end(candidates, qrels, cross_encoder_folder, tmp_path):
    candidates.to_pickle(tmp_path / "frame")
    qrels.to_pickle(tmp_path / "qrels")

    def start(folder, pause):
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            tmp_path / "frame",
            tmp_path / "qrels",
            cross_encoder_folder,
            folder,
            str(pause),
        ]
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    whole = start(tmp_path / "whole", 0).communicate()[0]
    killed = start(tmp_path / "killed", 0.1)
    waited = time.monotonic() + 120
    reached = tmp_path / "killed" / "checkpoint-8" / "trainer_state.json"
    while not reached.exists() and killed.poll() is None and time.monotonic() < waited:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate()[0] == "" and killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint-24").exists()
    assert start(tmp_path / "killed", 0).communicate()[0] == whole != ""


@pytest.mark.slow  # two processes, which both import torch
def test_two_processes_learn_as_one(candidates, qrels, cross_encoder_folder, tmp_path):
    candidates.to_pickle(tmp_path / "frame")
    qrels.to_pickle(tmp_path / "qrels")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    model = shutil.copytree(cross_encoder_folder, tmp_path / "model")
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | without_dropout))
    arguments = [tmp_path / "script.py", tmp_path / "frame", tmp_path / "qrels", model]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    scores = {}
    for name, command in {"one": [sys.executable], "two": together}.items():
        printed = subprocess.run(
            [*map(str, command), *map(str, arguments), str(tmp_path / name), "0"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout.splitlines()
        found = np.array([json.loads(line.partition(" ")[2]) for line in printed])
        assert len(found) == (2 if name == "two" else 1)
        scores[name] = found - found.mean(1, keepdims=True)  # lce does not change if all scores are shifted
    assert abs(scores["one"]).max() > 1
    np.testing.assert_allclose(scores["two"], np.repeat(scores["one"], 2, 0), atol=1e-3)


def test_a_folder_goes_on_only_with_the_training_that_began_there(student, candidates, qrels, tmp_path):
    settings = {"steps": 4, "batch_size": 4, "micro_batch": 4, "folder": tmp_path, **QUIET}
    FineTune(student, **settings).fit(candidates, qrels)
    trained = student(candidates)
    again = FineTune(student, **settings)
    again.fit(candidates, qrels)
    pd.testing.assert_frame_equal(student(candidates), trained)
    with pytest.raises(ValueError, match=r"has checkpoints of training with another recipe.*learning_rate"):
        FineTune(student, learning_rate=1.0, **settings).fit(candidates, qrels)
    with pytest.raises(ValueError, match=r"has checkpoints of training with another seed \(1; now 2\)"):
        FineTune(student, **settings | {"seed": 2}).fit(candidates, qrels)


def test_the_best_weights_on_validation_queries_are_kept(student, candidates, qrels):
    """The teacher prefers the passages that are not relevant, so the student gets worse. The first measurement is the
    best."""
    wrong = candidates.merge(qrels.rename(columns={"label": "score_"}), how="left").fillna({"score_": 0})
    FineTune(student, steps=40, batch_size=8, micro_batch=8, learning_rate=3e-3, **QUIET).fit(candidates, qrels)
    teacher = wrong.assign(score=-wrong.score_)[["qid", "docno", "score"]]
    training = Distil(
        student, teacher, steps=30, every=5, batch_size=8, micro_batch=8, learning_rate=1e-3, patience=2, **QUIET
    )
    training.fit(candidates, None, candidates, qrels)
    measured = training.log.dropna(subset="nDCG@10")
    assert measured["nDCG@10"].iloc[0] == measured["nDCG@10"].max() > measured["nDCG@10"].min()
    assert measured.step.max() < 30  # stopped early, by `patience`
    assert distil.ndcg_at_10(student, candidates, judgements(candidates, qrels)) == pytest.approx(
        measured["nDCG@10"].max()
    )


def test_the_same_seed_gives_the_same_student(electra, candidates, qrels):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = CrossEncoder.from_backbone(str(electra), device="cpu")
        FineTune(model, steps=5, batch_size=4, n_passages=3, seed=seed, learning_rate=1e-3, verbose=False).fit(
            candidates, qrels
        )
        found.append(model(candidates).score.tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("warmup, steps", [(0, 0), (0.25, 10), (0.03, 1), (1, 1), (12, 12)])
def test_a_warm_up_below_one_is_a_share_of_the_steps(warmup, steps):
    arguments = training_arguments(
        8, Recipe(1e-3, steps=40, warmup=warmup), Settings(), torch.device("cpu"), validated=False
    )
    assert arguments["warmup_steps"] == steps


def test_a_warm_up_that_outlasts_the_training_is_a_warning():
    recipe = Recipe(5e-5, steps=40, warmup=100, batch_size=8)
    with pytest.warns(UserWarning, match="rises for 100 steps, and the training has 40: it never reaches 5e-05"):
        training_arguments(8, recipe, Settings(), torch.device("cpu"), validated=False)


def test_accumulated_batches_give_the_gradient_of_one(electra, candidates, qrels):
    found = []
    for micro_batch in (2, 8):
        torch.manual_seed(0)
        model = CrossEncoder.from_backbone(str(electra), device="cpu")
        for module in model.load().network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        FineTune(model, steps=3, batch_size=8, micro_batch=micro_batch, learning_rate=1e-3, **QUIET).fit(
            candidates, qrels
        )
        scores = model(candidates).score.to_numpy()
        found.append(scores - scores.mean())  # the gradient of the head's bias is only rounding error
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_after_training_the_student_is_as_it_was_but_for_its_weights(cross_encoder_folder, candidates, qrels):
    model = CrossEncoder(str(cross_encoder_folder), device="cpu", dtype="bfloat16")
    FineTune(model, steps=2, batch_size=2, **QUIET).fit(candidates, qrels)
    network = model.load().network
    assert not network.training
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert network.body.config._attn_implementation == "sdpa"


def test_a_sequence_classifier_and_a_student_that_stopped_in_an_error_stay_usable(
    cross_encoder_folder, candidates, qrels
):
    model = CrossEncoder(str(cross_encoder_folder), device="cpu")
    expected = model(candidates)
    with pytest.raises(TypeError):
        FineTune(model, steps=2, batch_size=2, options={"no_such_option": 1}, **QUIET).fit(candidates, qrels)
    pd.testing.assert_frame_equal(model(candidates), expected)


# Pipelines, representations, recipes, errors


def test_in_a_pipeline_it_is_its_student(student, candidates, qrels):
    first = pt.Transformer.from_df(pt.model.add_ranks(candidates.copy()))
    pipeline = first % 4 >> FineTune(student, steps=1, batch_size=2, **QUIET)
    topics = candidates[["qid", "query"]].drop_duplicates()
    pipeline.fit(topics, qrels, None, None)
    pd.testing.assert_frame_equal(pipeline(topics), (first % 4 >> student)(topics))
    training = Distil(student)
    assert pt.inspect.transformer_inputs(training) == pt.inspect.transformer_inputs(student)
    assert pt.inspect.transformer_outputs(training, ["qid", "query", "docno", "text"]) == [
        "qid",
        "query",
        "docno",
        "text",
        "score",
        "rank",
    ]
    assert "CrossEncoder" in pt.schematic.draw(pipeline)
    with pytest.raises(pt.validate.InputValidationError):
        training(candidates.drop(columns="text"))
    with pytest.raises(pt.validate.InputValidationError):
        Distil(student, steps=1, **QUIET).fit(candidates.drop(columns="text"))


def test_a_cutoff_fuses_into_the_student():
    model = LiT5Distill(str(LIT5), window_size=6, device="cpu")
    fused = (pt.Transformer.identity() >> Distil(model) % 2).compile()
    shorter = LiT5Distill(str(LIT5), window_size=6, top_k=2, device="cpu")
    assert repr(fused).endswith(f"{Distil(shorter)!r} >> RankCutoff(2))")
    assert Distil(CrossEncoder("x")).fuse_rank_cutoff(3) is None


def test_the_representation_rebuilds_it(student):
    training = Distil(CrossEncoder("a/b"), None, recipe="rank-distillm-rankings", steps=7, loss="adr_mse")
    text = "Distil(CrossEncoder('a/b'), None, recipe='rank-distillm-rankings', steps=7, loss='adr_mse')"
    assert repr(training) == text
    assert repr(eval(text)) == text
    changed = pt.inspect.transformer_apply_attributes(training, seed=5)
    assert repr(changed) == f"{text[:-1]}, seed=5)"
    assert (changed.chosen_settings().seed, changed.chosen_recipe().steps) == (5, 7)
    again = pt.inspect.transformer_apply_attributes(changed, seed=6, steps=8, recipe=None)
    assert (again.chosen_settings().seed, again.settings) == (6, {"steps": 8, "loss": "adr_mse", "seed": 6})
    for copied in (copy.copy(changed), copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert repr(copied) == repr(changed)


class Own(CrossEncoder):
    """A user's own reranker. Its module has no training module of the same name."""


def test_a_subclass_learns_as_its_parent_does(cross_encoder_folder, candidates, qrels):
    subclass, parent = (kind(str(cross_encoder_folder), device="cpu") for kind in (Own, CrossEncoder))
    for student in (subclass, parent):
        FineTune(student, steps=2, batch_size=2, learning_rate=1e-2, **QUIET).fit(candidates, qrels)
    pd.testing.assert_frame_equal(subclass(candidates), parent(candidates))


@pytest.mark.parametrize("known", RERANKERS.values(), ids=RERANKERS)
def test_processes_that_prepare_batches_are_given_all_they_need(known, candidates):
    """On some systems, these processes are spawned, so all that they are given is pickled."""
    student = known.kind(str(known.random), device="cpu")
    frame = candidates.assign(target=range(len(candidates)), answers="one")
    objective = FineTune(student).chosen_recipe().objective(student)
    lists = objective.prepare(rankings(frame, objective.column_sets))
    sample, collate, same_lists = pickle.loads(pickle.dumps((objective.sample, objective.collate, lists)))
    expected = objective.collate([objective.sample(given, random.Random(0)) for given in lists])
    assert repr(collate([sample(given, random.Random(0)) for given in same_lists])) == repr(expected)


def test_recipes_are_the_papers():
    labels, rankings_ = cross_encoder.RECIPES["rank-distillm-labels"], cross_encoder.RECIPES["rank-distillm-rankings"]
    assert (
        FineTune(CrossEncoder("x")).chosen_recipe() == labels and Distil(CrossEncoder("x")).chosen_recipe() == rankings_
    )
    shared = ("learning_rate", "batch_size", "weight_decay", "warmup", "schedule", "clip")
    for recipe in (labels, rankings_):
        assert [getattr(recipe, name) for name in shared] == [1e-5, 32, 0.01, 0, "constant", 0]
    assert (labels.loss, labels.n_passages, labels.steps) == ("lce", 8, 20_000)
    assert (rankings_.loss, rankings_.n_passages, rankings_.epochs) == ("ranknet", None, 3)
    windows = Distil(LiT5Distill("x")).chosen_recipe()
    assert [getattr(windows, name) for name in ("learning_rate", "batch_size", "warmup", "dropout", "decay")] == [
        5e-5,
        64,
        100,
        0.1,
        0.95,
    ]
    ranking, alignment = (pe_rank.RECIPES[f"pe-rank-{name}"] for name in ("ranking", "alignment"))
    assert [ranking.learning_rate, ranking.batch_size, ranking.kl_weight, ranking.clip] == [2e-5, 32, 0.2, 1.0]
    assert [alignment.learning_rate, alignment.warmup, alignment.schedule, alignment.max_length] == [
        1e-3,
        0.03,
        "cosine",
        512,
    ]


@pytest.mark.parametrize(
    "build, error, words",
    [
        (
            lambda s: FineTune(s, speed=1),
            TypeError,
            "'speed' is not a setting of PairRecipe; there are learning_rate, batch_size",
        ),
        (
            lambda s: FineTune(s, speed=1),
            TypeError,
            "max_tokens; and, whatever the recipe, folder, every, patience, seed, verbose",
        ),
        (
            lambda s: FineTune(s, recipe="best"),
            ValueError,
            "recipe='best'; CrossEncoder has 'rank-distillm-labels', 'rank-distillm-rankings'",
        ),
        (lambda s: FineTune(s, loss="hinge"), ValueError, "loss='hinge'; wanted one of 'lce', 'ranknet'"),
        (lambda s: FineTune(s, sampling="best"), ValueError, "sampling='best'"),
        (lambda s: FineTune(s, batch_size=3, micro_batch=2), ValueError, "multiple of micro_batch"),
        (lambda s: FineTune(s, steps=0), ValueError, "steps=0, epochs=1.0: that is less than one step"),
        (lambda s: FineTune(s, steps=None, epochs=0), ValueError, "steps=None, epochs=0: that is less than one step"),
        (
            lambda s: FineTune(pt.Transformer.identity()),
            TypeError,
            "cannot be trained; wanted one of the rerankers of pyterrier_lit, such as CrossEncoder",
        ),
        (
            lambda s: Distil(LiT5Score(str(LIT5), device="cpu")),
            TypeError,
            "learns from answers, not from a teacher's ranking; use FineTune",
        ),
        (lambda s: FineTune(LiT5Distill(str(LIT5), device="cpu"), smallest=30), ValueError, "windows of 30 to 20"),
        (lambda s: FineTune(s, recipe=Recipe(1e-3)), NotImplementedError, "has no objective"),
    ],
)
def test_what_makes_no_sense_is_refused(student, candidates, qrels, build, error, words):
    with pytest.raises(error, match=words):
        build(student).fit(candidates, qrels)


def test_without_anything_to_learn_from_the_error_says_so(student, candidates, qrels):
    with pytest.raises(
        ValueError,
        match="nothing to learn from in 8 queries; wanted queries with passages that are not all worth the same",
    ):
        Distil(student, candidates.assign(score=1.0), **QUIET).fit(candidates)
    with pytest.raises(
        ValueError,
        match="nothing to learn from in 8 queries; wanted queries with a text or a list of texts in the column",
    ):
        FineTune(LiT5Score(str(LIT5), device="cpu"), **QUIET).fit(candidates.assign(answers=None))
    with pytest.raises(ValueError, match="nothing to learn from in 8 queries"):
        Distil(PERank(str(PE_RANK / "checkpoint"), device="cpu"), candidates.assign(score=1.0), **QUIET).fit(candidates)
    with pytest.raises(ValueError, match="0 lists to learn from"):
        train(
            cross_encoder.RECIPES["rank-distillm-labels"].objective(student),
            [],
            cross_encoder.RECIPES["rank-distillm-labels"],
        )


def test_a_saved_pe_rank_cannot_be_aligned_any_more(backbone, candidates, tmp_path):
    model = PERank.from_backbone(backbone("mistral"), embedding_size=8, device="cpu")
    model.save(tmp_path)
    frame = candidates.assign(doc_vec=[np.ones(8, "float32")] * len(candidates))
    with pytest.raises(ValueError, match=r"has no lm_head\.weight, because `save` leaves it out"):
        FineTune(PERank(str(tmp_path), device="cpu"), recipe="pe-rank-alignment", **QUIET).fit(frame)


@pytest.mark.parametrize("recipe", pe_rank.RECIPES)
def test_vectors_that_are_wrong_are_named_before_the_first_step(candidates, recipe, monkeypatch):
    monkeypatch.setattr(distil, "train", lambda *_, **__: pytest.fail("it learned"))
    vectors = list(np.ones((len(candidates), 24), "float32"))
    last = [*vectors[:-1], np.full(24, np.nan, "float32")]
    teaches, distinct = (FineTune if "alignment" in recipe else Distil), candidates.assign(text=candidates.docno)
    for given, options, words in (
        (distinct.assign(doc_vec=last), {}, "the vector of a passage holds nan: docno 'h5'"),
        (distinct.assign(doc_vec=[v[:9] for v in vectors]), {}, "have 9 dimensions and this checkpoint reads 24"),
        (distinct, {"vectors": Index({"other": vectors[0]})}, "holds no vectors of .* docnos, such as 'a0'"),
        (distinct, {"encoder": Encoder(9)}, "have 9 dimensions and this checkpoint reads 24"),
    ):
        student = PERank(str(PE_RANK / "checkpoint"), device="cpu", **options)
        with pytest.raises(ValueError, match=words):
            quietly(teaches(student, recipe=recipe, **QUIET).fit, given)


def test_a_window_whose_prompt_is_too_long_is_named(backbone, candidates):
    model = PERank.from_backbone(backbone("mistral"), embedding_size=8, device="cpu", window_size=6, stride=3)
    frame = candidates.assign(doc_vec=[np.ones(8, "float32")] * len(candidates))
    with pytest.raises(
        ValueError, match=r"the prompt for query '\w' with 6 passages has \d+ tokens; wanted at most 100"
    ):
        FineTune(model, max_length=100, steps=1, batch_size=2, **QUIET).fit(
            frame, pd.DataFrame({"qid": ["q0"], "docno": ["a0"], "label": [1]})
        )
