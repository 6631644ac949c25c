"""How a Fusion-in-Decoder learns an answer: passages encoded in parts that are computed anew for the gradient, one decoder over them all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from pyterrier_lit.batching import encoder_tokens, like_lengths
from pyterrier_lit.models.checkpoints import T5
from pyterrier_lit.models.t5 import EOS, START, FiD
from pyterrier_lit.training.losses import decayed_cross_entropy
from pyterrier_lit.training.trainer import Batch, Objective

Read = tuple[list[list[int]], list[int]]  # the prompts of a window, and the answer with EOS


class AnswerObjective(Objective):
    """The cross-entropy of answers to windows of prompts, token t weighted by decay^t."""

    def __init__(self, t5: T5, dropout: float, decay: float, max_tokens: int | None):
        super().__init__(t5.network.requires_grad_(True))
        self.t5, self.fid = t5, FiD(t5.network, t5.tied)
        self.decay, self.max_tokens, self.forgets = decay, max_tokens, False
        for module in t5.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
            elif isinstance(getattr(module, "dropout", None), float):  # of attention weights
                module.dropout = dropout

    def forget(self) -> None:
        """Encode each part of the passages anew for the gradient: what is kept of a passage is its states."""
        self.forgets = True

    def read(self, example: Any) -> Read:
        """The prompts and the answer of an example, in ids."""
        raise NotImplementedError

    def collate(self, examples: list[Any]) -> dict[str, Batch]:
        """Prompts and answers in ids."""
        windows, answers = zip(*map(self.read, examples), strict=True)
        return {"batch": Batch(windows=windows, answers=answers)}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of B examples."""
        states, mask = self._fuse(batch.windows)
        labels = pad_sequence(
            [torch.tensor(answer) for answer in batch.answers], batch_first=True, padding_value=-1
        ).to(self.device)
        written = torch.cat([labels.new_full((len(labels), 1), START), labels[:, :-1].clamp_min(EOS)], 1)
        decoded = self.t5.network.decoder(input_ids=written, encoder_hidden_states=states, encoder_attention_mask=mask)
        logits = self.fid.logits(decoded.last_hidden_state)
        return {"loss": decayed_cross_entropy(logits, labels, labels >= 0, self.decay)}

    def _fuse(self, windows: Sequence[Sequence[Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """B windows of prompts -> states (B, S, D) and mask (B, S): the passages of each window one behind the other."""
        prompts = [prompt for window in windows for prompt in window]
        encoded: list[Any] = [None] * len(prompts)
        for part in like_lengths([len(prompt) for prompt in prompts], self.max_tokens or encoder_tokens(self.device)):
            asked = [prompts[i] for i in part]
            states = checkpoint(self.fid.encode, asked, use_reentrant=False) if self.forgets else self.fid.encode(asked)
            for i, state in zip(part, states, strict=True):
                encoded[i] = state
        rest = iter(encoded)
        joined = [torch.cat([next(rest) for _ in window]) for window in windows]
        mask = pad_sequence([torch.ones(len(window), dtype=torch.long) for window in joined], batch_first=True)
        return pad_sequence(joined, batch_first=True), mask.to(self.device)
