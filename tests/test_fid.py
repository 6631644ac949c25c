"""models.t5: each step of FiD equals a step of the decoder of transformers over the concatenated encoder states."""

import functools

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from pyterrier_lit.models.t5 import FiD

close = functools.partial(torch.testing.assert_close, atol=2e-4, rtol=2e-3)  # random weights amplify float32's rounding


@pytest.fixture(params=["tied", "untied", "shallow encoder", "shallow decoder"])
def fid(request):
    torch.manual_seed(0)
    depths = {"shallow encoder": (1, 3), "shallow decoder": (3, 1)}.get(request.param, (2, 2))
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=7, d_ff=32, num_layers=depths[0], num_decoder_layers=depths[1], num_heads=3,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=12,
        initializer_factor=3.0,
    )  # fmt: skip
    network = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if request.param != "tied":
        network.lm_head = torch.nn.Linear(24, 50, bias=False)
        network.config.scale_decoder_outputs = False
    return FiD(network)


WINDOWS = [[[5, 6, 7, 1], [8, 9, 1]], [[10, 11, 12, 13, 14, 15, 1]], [[20, 1], [21, 22, 1], [5, 6, 7, 1]]]
WRITTEN = torch.tensor([[0, 3, 9, 4, 30, *range(20)], [0, 7, 7, 41, 8] + [2] * 20, [0, 2, 40, 6, 5] + [9] * 20])


@torch.inference_mode()
def test_each_step_equals_the_librarys_decoder_over_the_concatenated_states(fid):
    memory = fid.read_prompts(WINDOWS, steps=25, mass=True)
    plain = fid.read_prompts(WINDOWS, steps=25)
    ours, masses, without_mass = [], [], []
    for t in range(25):
        states, mass = fid.read(memory, WRITTEN[:, t : t + 1])
        ours.append(fid.logits(states)[:, 0])
        masses.append([layer[:, 0] for layer in mass])
        without_mass.append(fid.logits(fid.read(plain, WRITTEN[:, t : t + 1])[0])[:, 0])
    close(torch.stack(without_mass), torch.stack(ours))
    for row, window in enumerate(WINDOWS):
        alone = [fid.network.encoder(input_ids=torch.tensor([prompt])).last_hidden_state[0] for prompt in window]
        states = torch.cat(alone)[None]
        theirs = fid.network(
            encoder_outputs=BaseModelOutput(states), decoder_input_ids=WRITTEN[row : row + 1], output_attentions=True
        )
        close(torch.stack(ours)[:, row], theirs.logits[0])
        for layer, (block, attention) in enumerate(
            zip(fid.network.decoder.block, theirs.cross_attentions, strict=True)
        ):
            cross = block.layer[1].EncDecAttention
            norms = cross.v(states).view(*states.shape[:2], cross.n_heads, -1).norm(dim=-1)  # (1, S, H)
            expected = torch.einsum("bhts,bsh->bts", attention, norms)[0] / cross.n_heads
            got = torch.stack([mass[layer][row, : states.shape[1]] for mass in masses])
            close(got, expected)
            assert all(mass[layer][row, states.shape[1] :].eq(0).all() for mass in masses)


@pytest.mark.parametrize("mass", [False, True])
@torch.inference_mode()
def test_several_tokens_in_one_pass_give_the_states_and_the_mass_of_one_at_a_time(fid, mass):
    alone, together = (fid.read_prompts(WINDOWS, steps=25, mass=mass) for _ in range(2))
    one_by_one = [fid.read(alone, WRITTEN[:, t : t + 1]) for t in range(25)]
    passes = [fid.read(together, WRITTEN[:, start:stop]) for start, stop in ((0, 1), (1, 6), (6, 8), (8, 25))]
    close(torch.cat([states for states, _ in passes], 1), torch.cat([states for states, _ in one_by_one], 1))
    for layer in range(len(one_by_one[0][1])):
        close(torch.cat([each[layer] for _, each in passes], 1), torch.cat([each[layer] for _, each in one_by_one], 1))


@torch.inference_mode()
def test_what_a_window_takes_back_is_as_if_it_had_not_been_read(fid):
    """Each window keeps its own number of the tokens of a pass. The next pass continues after the tokens kept."""
    alone, together = (fid.read_prompts(WINDOWS, steps=30) for _ in range(2))
    expected = torch.cat([fid.read(alone, WRITTEN[:, t : t + 1])[0] for t in range(20)], 1)
    for width, kept in ((4, [4, 1, 3]), (2, [1, 2, 1]), (5, [5, 2, 2]), (1, [1, 1, 1]), (3, [0, 3, 1]), (4, [2, 2, 4])):
        read = list(together.read)
        ids = torch.stack([row[at : at + width] for row, at in zip(WRITTEN, read, strict=True)])
        wrong = torch.arange(width) >= torch.tensor(kept)[:, None]
        states, _ = fid.read(together, torch.where(wrong, 49, ids))
        for row, (at, count) in enumerate(zip(read, kept, strict=True)):
            close(states[row, :count], expected[row, at : at + count])
        together.read = [at + count for at, count in zip(read, kept, strict=True)]


@torch.inference_mode()
def test_rows_of_the_vocabulary_alone_give_their_logits(fid):
    states, rows = torch.randn(3, 24), torch.tensor([4, 4, 49])
    close(fid.logits(states, rows), fid.logits(states)[:, rows])


@torch.inference_mode()
def test_equal_prompts_are_encoded_once(fid, monkeypatch):
    seen = []
    encode = fid.encode
    monkeypatch.setattr(fid, "encode", lambda prompts: seen.extend(prompts) or encode(prompts))
    fid.read_prompts(WINDOWS, steps=1)
    assert sorted(seen) == sorted({tuple(prompt) for window in WINDOWS for prompt in window})


@torch.inference_mode()
def test_greedy_stops_after_every_row_has_ended_and_says_who_was_unfinished(fid, monkeypatch):
    answers = torch.tensor([[7, 1, 9], [8, 8, 1], [1, 5, 5]])
    steps = iter(answers.T)
    monkeypatch.setattr(fid, "logits", lambda states: torch.nn.functional.one_hot(next(steps), num_classes=50).float())
    written = list(fid.greedy(fid.read_prompts(WINDOWS, steps=9), 10))
    assert [ids.tolist() for ids, *_ in written] == answers.T.tolist()
    assert [alive.tolist() for _, alive, *_ in written] == [[True] * 3, [True, True, False], [False, True, False]]


@torch.inference_mode()
def test_greedy_says_which_window_gave_nan(fid, monkeypatch):
    logits = torch.zeros(3, 50)
    logits[1, 4] = float("nan")
    monkeypatch.setattr(fid, "logits", lambda states: logits)
    nan = [broken.isnan().tolist() for _, _, broken, _ in fid.greedy(fid.read_prompts(WINDOWS, steps=9), 10)]
    assert nan == [[False, True, False]] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_attention_mass_is_taken_in_float32_whatever_the_models_dtype(fid, dtype):
    """In bfloat16, the attention weights of many tokens would not add up to 1, and close masses would be equal."""
    fid.network.to(dtype)
    memory = fid.read_prompts([[[5, 6, 7, 8] * 60 + [1]] * 3], steps=3, mass=True)
    for norms, values in zip(memory.norms, memory.values, strict=True):
        assert norms.dtype == torch.float32
        assert torch.equal(norms, values.float().norm(dim=-1))
    memory.norms = [torch.ones_like(norms) for norms in memory.norms]  # with norms of 1, the masses add up to 1
    for mass in fid.read(memory, torch.tensor([[0, 3]]))[1]:
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2), atol=1e-5, rtol=0)
