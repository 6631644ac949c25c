"""Details of other libraries on which our code depends, although these libraries do not promise them.

A test fails if the installed version of a library has changed such a detail.
"""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import GOLDEN

from pyterrier_lit import CrossEncoder, LiT5Distill, PERank
from pyterrier_lit.frames import rankings
from pyterrier_lit.models.pair_encoder import LabelScorer
from pyterrier_lit.training import FineTune, lit5_distill
from pyterrier_lit.training.trainer import Objective, Recipe, Samples, Settings, train

LIT5 = GOLDEN / "lit5" / "tiny-random"
QUIET = Settings(verbose=False, seed=3)


@pytest.fixture
def frame():
    rows = [(f"q{q}", "ab", f"d{i}", f"{'ab' if i == q else 'no'} {i}", -i) for q in range(4) for i in range(4)]
    return pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score"])


@pytest.fixture
def qrels():
    return pd.DataFrame([(f"q{q}", f"d{q}", 1) for q in range(4)], columns=["qid", "docno", "label"])


def line(batches, weight=0.5):
    """An objective that fits a line to points. Each list of numbers that `collate` gets is appended to `batches`."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, weight)
    torch.nn.init.zeros_(network.bias)

    def collate(numbers):
        batches.append(numbers)
        return torch.tensor(numbers, dtype=torch.float32)[:, None]

    return Objective(
        network=network,
        column_sets=[],
        prepare=list,
        sample=lambda number, rng: number,
        collate=collate,
        loss=lambda x: F.mse_loss(network(x.to(network.weight.device)), 2 * x.to(network.weight.device) + 1),
    )


# transformers.Trainer


def test_examples_are_learned_from_in_the_order_of_their_numbers():
    batches = []
    train(line(batches), range(10), Recipe(1e-3, batch_size=4, steps=5, micro_batch=2), QUIET)
    samples = Samples(lambda number, rng: number, range(10), 20, QUIET.seed)
    assert [number for batch in batches for number in batch] == [samples[i] for i in range(20)]
    assert {len(batch) for batch in batches} == {2}


def test_a_process_uses_one_gpu_however_many_torch_sees(monkeypatch):
    """If the Trainer used n GPUs, it would make batches n times as large, for DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    batches = []
    recipe = Recipe(1e-3, batch_size=8, steps=1, micro_batch=2, options={"use_cpu": False})
    train(line(batches), range(8), recipe, QUIET)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]


def test_the_gradient_over_micro_batches_is_that_of_one_batch():
    """The test compares gradient norms, because a constant factor of the gradient hardly changes AdamW's steps."""
    logs = [
        train(line([]), range(8), Recipe(1e-3, batch_size=8, steps=2, micro_batch=size, clip=1e9), QUIET)
        for size in (8, 4, 1)
    ]
    for log in logs[1:]:
        for step, expected in zip(log, logs[0], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


# Attention, dropout, gradient checkpointing: the models of transformers


def test_on_a_cpu_attention_is_eager_while_training_and_then_what_it_was(
    cross_encoder_folder, frame, qrels, monkeypatch
):
    student = CrossEncoder(str(cross_encoder_folder), device="cpu")
    body = student.load().network.body
    fused, seen = [], set()
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or attention(*a, **k))
    body.register_forward_pre_hook(lambda *_: seen.add((body.training, body.config._attn_implementation, bool(fused))))
    FineTune(student, steps=1, batch_size=2, verbose=False).fit(frame, qrels)
    assert seen == {(True, "eager", False)} and not fused
    student(frame)
    assert body.config._attn_implementation == "sdpa" and fused


def losses_of_a_window(frame, dropout, change=lambda network: None):
    torch.manual_seed(0)
    student = LiT5Distill(str(LIT5), window_size=4, device="cpu")
    objective = lit5_distill.RECIPES["lit5-distill-v2"].replace(dropout=dropout).objective(student)
    change(objective.network.train())
    (given, *_) = rankings(frame.assign(target=range(len(frame))), objective.column_sets)
    batch = objective.collate(
        [lit5_distill.OrderExample(given.query, given.columns["text"], list(range(len(given.columns["text"]))))]
    )
    with torch.no_grad():
        return objective.loss(batch).item(), objective.loss(batch).item(), objective.network


def test_a_recipes_dropout_is_that_of_the_t5(frame):
    first, second, network = losses_of_a_window(frame, 0.3)
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(layers) > 10 and {module.p for module in layers} == {0.3}
    assert first != second
    first, second, _ = losses_of_a_window(frame, 0.0)
    assert first == second


def test_a_recipes_dropout_is_also_that_of_the_t5s_attention_weights(frame):
    def keep_only_that(network):
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    first, second, _ = losses_of_a_window(frame, 0.3, keep_only_that)
    assert first != second
    first, second, _ = losses_of_a_window(frame, 0.0, keep_only_that)
    assert first == second


def cross_encoder(backbone, electra):
    student = CrossEncoder.from_backbone(str(electra), device="cpu")
    return student, student.load().network.body.encoder.layer[0].attention, {}


def pe_rank(backbone, electra):
    student = PERank.from_backbone(backbone("mistral"), embedding_size=8, window_size=4, stride=2, device="cpu")
    return student, student.load().network.body.layers[0].self_attn, {"text_weight": 0.0}


def pe_rank_alignment(backbone, electra):
    student = PERank.from_backbone(backbone("mistral"), embedding_size=8, window_size=4, stride=2, device="cpu")
    return student, student.load().network.body.layers[0].self_attn, {"recipe": "pe-rank-alignment"}


def lit5(backbone, electra):
    student = LiT5Distill(str(LIT5), window_size=4, device="cpu")
    return student, student.load().network.encoder.block[0].layer[0].SelfAttention, {}


@pytest.mark.parametrize("build", [cross_encoder, pe_rank, pe_rank_alignment, lit5])
def test_gradient_checkpointing_runs_the_layers_a_second_time(build, backbone, electra, frame, qrels):
    vectors = np.random.default_rng(0).normal(size=(len(frame), 8)).astype("float32")
    frame = frame.assign(doc_vec=list(vectors))
    runs = {}
    for checkpointing in (False, True):
        student, layer, settings = build(backbone, electra)
        counted = []
        layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        training = FineTune(student, steps=1, batch_size=1, checkpointing=checkpointing, verbose=False, **settings)
        training.fit(frame, qrels)
        runs[checkpointing] = len(counted)
    assert runs == {False: 1, True: 2}


@pytest.mark.parametrize("kind", ["Bert", "Electra"])
def test_token_types_reach_a_sequence_classifier(kind):
    """`LabelScorer` passes token types only if the model's `forward` has the argument `token_type_ids`. If transformers
    hid this name, all token types would be 0."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=16, num_labels=1, initializer_range=0.5)
    scorer = LabelScorer(getattr(transformers, f"{kind}ForSequenceClassification")(config).eval())
    ids = torch.tensor([[2, 5, 6, 3, 7, 8, 3]])
    ones, types = torch.ones_like(ids), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    with torch.inference_mode():
        scored = scorer(input_ids=ids, attention_mask=ones, token_type_ids=types)
        assert torch.equal(scored, scorer.model(ids, attention_mask=ones, token_type_ids=types).logits[:, -1])
        assert not torch.allclose(scored, scorer(input_ids=ids, attention_mask=ones, token_type_ids=0 * types))
