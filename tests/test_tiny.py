"""experiments/tiny: what the initial weights of the small LiT5s and of the small PE-Rank compute."""

import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "tiny"))
import lit5
import mistral

from pyterrier_lit.models.pe_prompts import PROMPT
from pyterrier_lit.models.t5 import EOS, FiD

PASSAGES, PIECES = 20, 60


@pytest.fixture
def chance():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def vectors(chance):
    """The vector of a query (D), the vectors of passages (PASSAGES, D), and their cosines with the query. D is
    lit5.MEANING. The cosines are .9, .86, ... in random order."""
    query, *others = F.normalize(torch.randn(PASSAGES + 1, lit5.MEANING, generator=chance), dim=1)
    cosines = 0.9 - 0.04 * torch.randperm(PASSAGES, generator=chance)
    away = F.normalize(torch.stack([other - (other @ query) * query for other in others]), dim=1)
    return query, cosines[:, None] * query + (1 - cosines**2)[:, None].sqrt() * away, cosines


def planned(folder, chance, labels, sharp, identifiers):
    alone = torch.randn(PIECES, lit5.MEANING, generator=chance)
    lit5.write_t5(folder, alone, labels, sharp, identifiers)
    network = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    network.load_state_dict({name: tensor.half().float() for name, tensor in network.state_dict().items()})
    return FiD(network)


def states(query, passages, labels, chance):
    """The encoder states of each passage's prompt, (6, lit5.WIDTH). The first token carries the vector of the query.
    The last token carries the vector and the label of the passage. The other tokens carry nothing."""
    prompts = []
    for passage, label in zip(passages, labels, strict=True):
        prompt = torch.zeros(6, lit5.WIDTH)
        prompt[:, lit5.LABEL.stop :].normal_(generator=chance)
        prompt[:, lit5.CONSTANT] = 1.0
        prompt[0, : lit5.MEANING], prompt[0, lit5.QUERY] = lit5.VECTOR_LENGTH * query, lit5.MARK_LENGTH
        prompt[5, : lit5.MEANING], prompt[5, lit5.PASSAGE] = lit5.VECTOR_LENGTH * passage, lit5.MARK_LENGTH
        prompt[5, lit5.LABEL] = label
        prompts.append(prompt)
    return prompts


@torch.inference_mode()
def test_identifiers_are_written_once_each_from_the_passage_most_like_the_query_down(tmp_path, chance, vectors):
    query, passages, cosines = vectors
    codes, first = lit5.LABEL_LENGTH * torch.eye(lit5.LABELS)[:PASSAGES], 30
    fid = planned(tmp_path, chance, {first + i: code for i, code in enumerate(codes)}, sharp=40.0, identifiers=True)
    memory = fid.memory([states(query, passages, codes, chance)], PASSAGES + 1)
    written = [int(ids) - first for ids, *_ in fid.greedy(memory, PASSAGES + 1)]
    look = 40.0 * cosines - lit5.RANK_BONUS * torch.arange(PASSAGES)
    assert written[:-1] == look.argsort(descending=True).tolist()[:-1]  # the last one left needs no decoding


@torch.inference_mode()
def test_attention_falls_with_the_cosine_and_the_answer_is_the_first_passages_name(tmp_path, chance, vectors):
    query, passages, cosines = vectors
    codes = lit5.LABEL_LENGTH * F.normalize(torch.randn(PIECES, lit5.LABELS, generator=chance), dim=1)
    fid = planned(tmp_path, chance, dict(enumerate(codes)), sharp=20.0, identifiers=False)
    names = list(range(10, 10 + PASSAGES))
    memory = fid.memory([states(query, passages, codes[names], chance)], 5, mass=True)
    ids, *_, masses = zip(*fid.greedy(memory, 5), strict=True)
    assert [int(step) for step in ids] == [names[int(cosines.argmax())], EOS]
    for first, second in masses:
        assert (
            second.view(PASSAGES, 6)[:, 5].argsort(descending=True).tolist()
            == cosines.argsort(descending=True).tolist()
        )
        assert first.view(PASSAGES, 6)[:, 1:].max() < second.view(PASSAGES, 6)[:, 5].max() / 100


@torch.inference_mode()
def test_a_planned_mistral_ends_its_prompt_with_the_mean_of_the_querys_words(tmp_path, chance):
    split = tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    fixed = list(dict.fromkeys([*(word.lower() for word, _ in split(mistral.PROMPT_WORDS)), *mistral.SILENT]))
    vocabulary = ["[PAD]", *fixed, "delete", "folder", "copy", "file", *(f"other{i}" for i in range(2 * len(fixed)))]
    words = torch.randn(len(vocabulary), mistral.WIDTH, generator=chance)
    words[1 : 1 + len(fixed)] *= 1e-3  # short, as training makes the prompt's words, which say nothing about a query
    mistral.write_mistral(tmp_path, vocabulary, words)
    model = transformers.MistralForCausalLM.from_pretrained(tmp_path).eval()
    projector = torch.nn.Linear(mistral.WIDTH, mistral.WIDTH)
    mistral.plan_projector(projector, torch.zeros(mistral.WIDTH), torch.eye(mistral.WIDTH))
    passages = F.normalize(torch.randn(PASSAGES, mistral.WIDTH, generator=chance), dim=1)
    number = {word: i for i, word in enumerate(vocabulary)}

    def state(query):
        shown = " ".join(f"Passage {i}: [ x ]" for i in range(1, PASSAGES + 1))
        prompt = [word.lower() for word, _ in split(PROMPT.format(n=PASSAGES, query=query, passages=shown))]
        inputs = model.model.embed_tokens(torch.tensor([number.get(word, 0) for word in prompt]))
        inputs[[i for i, word in enumerate(prompt) if word == "x"]] = projector(passages)
        return model.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1, : mistral.MEANING]

    means = {
        query: words[[number[word] for word in query.split()], : mistral.MEANING].sum(0)
        for query in ("delete folder", "copy file")
    }
    for query, mean in means.items():
        found = state(query)
        assert F.cosine_similarity(found, mean, dim=0) > 0.8
        assert all(F.cosine_similarity(found, other, dim=0) < 0.3 for name, other in means.items() if name != query)


def test_a_planned_projector_keeps_the_main_directions_of_vectors_around_their_mean(chance):
    vectors = torch.randn(5, 200, generator=chance)
    middle, directions = torch.randn(200, generator=chance), torch.randn(200, mistral.WIDTH, generator=chance)
    projector = torch.nn.Linear(200, mistral.WIDTH)
    mistral.plan_projector(projector, middle, directions)
    wanted = mistral.PASSAGE_LENGTH * (vectors - middle) @ directions
    assert torch.allclose(projector(vectors)[:, : mistral.MEANING], wanted[:, : mistral.MEANING], atol=1e-3)
    assert (projector(vectors)[:, mistral.PASSAGE] == mistral.MARK).all()
