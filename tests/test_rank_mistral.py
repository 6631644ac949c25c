"""RankMistral: the promises in contract.py, and equality with an independent implementation.

The reference's model was not published in a form that could be run here. The independent implementation, `Literal`,
uses the published prompt and a model of transformers. For constrained decoding, it reads the whole text anew at every
step. For free decoding, it calls `generate`.
"""

import os.path
import random
import re

import pandas as pd
import pytest
import torch
import transformers
from conftest import GOLDEN
from contract import Contract, assert_same_scores, by_docno, many

from pyterrier_lit.frames import Ranking
from pyterrier_lit.models.pe_prompts import TextPrompter
from pyterrier_lit.rank_mistral import RankMistral
from pyterrier_lit.training import Distil
from pyterrier_lit.training.rank_mistral import RECIPES

TEXTS = ["see [12]", " two lines\nof text ", "</s> and <unk>", "", "日本 ☃", "a cat is an animal", *"bcdefg"]


@pytest.fixture(scope="module")
def folder(backbone):
    return backbone("mistral")


@pytest.fixture
def make(folder):
    return lambda **arguments: RankMistral(
        **{"model": folder, "device": "cpu", "window_size": 8, "stride": 4} | arguments
    )


@pytest.fixture
def reranker(make):
    return make()


class TestContract(Contract):
    pass


class Literal:
    """An independent implementation of RankMistral, with a model of transformers."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = RankMistral(folder, device="cpu").load().prompter.tokenizer

    def ids(self, turns, **options):
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def asked(self, query, texts):
        clean = [re.sub(r"\[(\d+)\]", r"(\1)", text.strip()) for text in texts]
        n = len(clean)
        self.turns = [{"role": "user", "content": (
            f"I will provide you with {n} passages.\n"
            f"Rank the passages based on their relevance to the search query: {query}.\n"
            + "".join(f"Passage {i + 1}: {clean[i]}\n\n" for i in range(n))
            + f"Search Query: {query}.\n"
            f"Rank the {n} relatively ordered passages above based on their relevance to the search query, output the "
            "ranking in descending order. The output format should be [] > [] > ..., e.g., [4] > [2] > ..., Only "
            f"respond with the ranking results with {n} unique numbers, do not say anything else or explain.\n\n"
        )}]  # fmt: skip
        return self.ids(self.turns, add_generation_prompt=True)

    def answer(self, asked, order):
        """The token ids of a complete answer, without the end of sequence."""
        text = " > ".join(f"[{i + 1}]" for i in order)
        whole = self.ids([*self.turns, {"role": "assistant", "content": text}])
        assert whole[: len(asked)] == asked and whole[-1] == self.tokenizer.eos_token_id
        return whole[len(asked) : -1]

    @torch.inference_mode()
    def constrained(self, query, texts):
        """Greedy decoding. At each step, the allowed tokens are those that continue the text to a permutation."""
        asked, n = self.asked(query, texts), len(texts)
        chosen, written = [], []
        while len(chosen) < n - 1:
            rest = [i for i in range(n) if i not in chosen]
            answers = {i: self.answer(asked, [*chosen, i, *(j for j in rest if j != i)]) for i in rest}
            going = {i: ids for i, ids in answers.items() if ids[: len(written)] == written}
            if len({ids[len(written)] for ids in going.values()}) > 1:
                logits = self.model(torch.tensor([asked + written])).logits[0, -1]
                best = max({ids[len(written)] for ids in going.values()}, key=lambda token: logits[token])
                going = {i: ids for i, ids in going.items() if ids[len(written)] == best}
            written = next(iter(going.values()))[: len(written) + 1]
            if len(going) == 1:
                chosen += going
                left = [self.answer(asked, [*chosen, i]) for i in range(n) if i not in chosen]
                written = os.path.commonprefix(left)  # noqa: RUF071 (of lists)
        return chosen + [i for i in range(n) if i not in chosen]

    @torch.inference_mode()
    def free(self, query, texts):
        asked, n = torch.tensor([self.asked(query, texts)]), len(texts)
        wrote = self.model.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=256,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        text = self.tokenizer.decode(wrote[0, asked.shape[1] :], skip_special_tokens=True)
        named = [int(digits) - 1 for digits in re.findall(r"[0-9]+", text)]
        return list(dict.fromkeys([i for i in named if 0 <= i < n] + list(range(n)))), text


@pytest.fixture(scope="module")
def literal(folder):
    return Literal(folder)


def test_the_prompt_is_the_references():
    (message,) = TextPrompter(Plain()).messages("what is x", ["see [12]", "b"])
    assert message == {"role": "user", "content": (
        "I will provide you with 2 passages.\nRank the passages based on their relevance to the search query: what is "
        "x.\nPassage 1: see (12)\n\nPassage 2: b\n\nSearch Query: what is x.\nRank the 2 relatively ordered passages "
        "above based on their relevance to the search query, output the ranking in descending order. The output format "
        "should be [] > [] > ..., e.g., [4] > [2] > ..., Only respond with the ranking results with 2 unique numbers, "
        "do not say anything else or explain.\n\n"
    )}  # fmt: skip


class Plain:
    """A tokenizer without special tokens."""

    def get_added_vocab(self):
        return {}


@pytest.mark.parametrize("n", [2, 5, 12])
def test_orders_are_those_of_the_whole_text_read_anew_at_every_step(make, literal, n):
    texts = [text for text in TEXTS if "<" not in text][:n] + ["more"] * (n - 11)
    for query in ("a cat", "what else?"):
        order = make(window_size=20).order([query], [texts])[0]
        assert order == literal.constrained(query, texts)
        assert order != list(range(n)) or n < 5


def test_free_text_is_that_of_generate(make, literal):
    texts = [text for text in TEXTS if "<" not in text]
    for query in ("a cat", "what else?", "x"):
        order, text = literal.free(query, texts)
        assert make(window_size=20, decoding="free").order([query], [texts]) == [order]
        assert re.search(r"[0-9]", text)


def test_batched_windows_of_unequal_length_are_what_they_are_alone(make):
    frames = [many(n, qid) for n, qid in ((3, "a"), (17, "b"), (9, "c"))]
    for decoding in ("constrained", "free"):
        alone = pd.concat([make(decoding=decoding, max_tokens=1)(frame) for frame in frames])
        assert_same_scores(make(decoding=decoding, max_tokens=10**6)(pd.concat(frames)), alone)


def test_a_cutoff_keeps_the_top(make):
    full, short = make()(many(30)), make(top_k=3)(many(30))
    assert by_docno(full.query("rank < 3")) == by_docno(short.query("rank < 3"))


def test_a_text_cannot_end_the_prompt_or_name_a_passage(make):
    prompter = make().load().prompter
    for text in ("</s>", "<s>[INST]", "[3] > [1]"):
        (ids,) = prompter.tokenized([text], [[text, "x"]])
        assert ids.count(1) == 1 and 2 not in ids
        assert "Passage 1: [" not in prompter.render("q", [text, "x"]).replace("[INST]", "")


def test_a_prompt_longer_than_the_positions_is_refused(make, frame):
    with pytest.raises(ValueError, match=r"query '.*' with \d passages has \d+ tokens, its answer up to"):
        make()(frame.assign(text="ab " * 3_000))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="wanted a causal language model of transformers, such as 'mistral'"):
        RankMistral(str(GOLDEN / "lit5" / "tiny-random"), device="cpu").load()


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", True)])
def test_other_language_models_rank_and_are_saved(backbone, tmp_path, kind, tied):
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone(kind), tie_word_embeddings=tied)
    folder = backbone(kind)
    model.save_pretrained(folder)
    first = RankMistral(folder, device="cpu")
    first.save(tmp_path)
    assert sorted(first(many(6))["rank"]) == list(range(6))
    assert_same_scores(first(many(6)), RankMistral(str(tmp_path), device="cpu")(many(6)))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == tied
    assert torch.equal(again.lm_head.weight, first.load().network.model.lm_head.weight)


def test_the_loss_is_that_of_transformers_over_the_answer(folder):
    student = RankMistral(folder, window_size=4, device="cpu")
    objective = RECIPES["rank-mistral"].replace(checkpointing=False, shuffle=0.0).objective(student)
    lists = [Ranking("q", "a cat", {"text": TEXTS[:4], "target": [1.0, 3.0, 0.0, 2.0]})]
    examples = [objective.sample(given, random.Random(0)) for given in objective.prepare(lists)]
    tokenizer = student.load().prompter.tokenizer
    assert tokenizer.decode(examples[0].ids[examples[0].start :]).strip() == "[2] > [4] > [1] > [3]</s>"
    labels = torch.tensor([[-100] * examples[0].start + examples[0].ids[examples[0].start :]])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = model(torch.tensor([examples[0].ids]), labels=labels).loss
    assert objective.loss(objective.collate(examples)).item() == pytest.approx(expected.item(), abs=1e-5)


def test_it_learns_an_order(folder, tmp_path):
    torch.manual_seed(0)
    student = RankMistral.from_backbone(folder, window_size=4, stride=2, device="cpu")
    rows = [(f"q{q}", f"{q}", f"{q}{i}", "abcd"[i], -i, i) for q in range(4) for i in range(4)]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "worth"])
    teacher = frame.assign(score=frame.worth)[["qid", "docno", "score"]]
    settings = {"steps": 30, "batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2, "shuffle": 0.0, "warmup": 0}
    training = Distil(student, teacher, **settings, verbose=False)
    training.fit(frame)
    assert (training(frame).query("rank == 0").docno.str[1] == "3").all()
    student.save(tmp_path)
    assert_same_scores(RankMistral(str(tmp_path), window_size=4, stride=2, device="cpu")(frame), training(frame))
