"""A causal language model of transformers that continues text prompts, and its checkpoint.

The prompts are processed as in the module `vector_lm`, but contain no vectors. They are padded on the left. If the
model attends to all previous tokens, a common prefix of all prompts is processed only once. Shapes: B is the number of
prompts, R the number of different tokens that may be generated, and H the width of the model.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from pyterrier_lit.models.checkpoints import Folder, save_checkpoint
from pyterrier_lit.models.library import library_model, position_limit
from pyterrier_lit.models.pe_prompts import TextPrompter, read_text_prompter
from pyterrier_lit.models.vector_lm import VectorLM, VectorReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_PLACEHOLDER = -1  # the placeholder's id in `VectorLM`. No token has this id, so no token is replaced by a vector
LONGEST_IDENTIFIER = 6  # tokens of "100] > [" if each character, with the space before it, is one token


class TextLM(VectorLM):
    """A causal language model of transformers: its body and its output layer.

    Args:
        model: the model of transformers.
    """

    def __init__(self, model: "PreTrainedModel"):
        body: Any = model.base_model
        super().__init__(body, nn.Identity(), NO_PLACEHOLDER)
        self.model = model

    def begin(self, prompts: list[list[int]], pieces: Sequence[int] | None = None) -> "TextReader":
        """Read B prompts and return a `TextReader`, which generates the tokens that follow them.

        Args:
            prompts: the token ids of each prompt.
            pieces: the vocabulary ids of the tokens that may be generated. None allows all tokens.
        """
        embeddings: Any = self.body.get_input_embeddings()
        begun = self.read(prompts, [torch.empty(0, self.body.config.hidden_size)] * len(prompts))
        ids = torch.arange(embeddings.num_embeddings) if pieces is None else torch.tensor(pieces, device="cpu")
        embedded = embeddings(ids.to(begun.device)).expand(len(prompts), -1, -1)
        return TextReader(self, begun.inputs, begun.mask, embedded, begun.cache, ids.to(begun.device))


class TextReader(VectorReader):
    """A `decoding.Reader` for B prompts that generates text tokens. The tokens that may be generated have the numbers
    0, 1, 2, ...: token i has the id ids[i] in the vocabulary of the model.

    Args:
        network: the language model.
        inputs: as in `VectorReader`.
        mask: as in `VectorReader`.
        embedded: (B, R, H), the embeddings of the R tokens that may be generated. They take the place of `passages` in
            `VectorReader`.
        cache: as in `VectorReader`.
        ids: (R,), the vocabulary ids of these R tokens.
    """

    def __init__(
        self,
        network: TextLM,
        inputs: torch.Tensor,
        mask: torch.Tensor,
        embedded: torch.Tensor,
        cache: Any,
        ids: torch.Tensor,
    ):
        super().__init__(network, inputs, mask, embedded, cache)
        head: Any = network.model.get_output_embeddings()
        self.weight = head.weight[ids]
        self.bias = None if getattr(head, "bias", None) is None else head.bias[ids]

    def _logits(self, last: int) -> torch.Tensor:
        """Process the current inputs. Returns float32 logits (B, last, R) after each of the last `last` inputs. Some
        models scale or cap the logits after the output layer. This step is left out, since it does not change the order
        of the tokens."""
        states, self.cache = self.network(self.inputs, self.mask, self.positions, self.cache)
        return F.linear(states[:, -last:], self.weight, self.bias).float()


@dataclasses.dataclass(eq=False)
class TextCheckpoint:
    """A causal language model in memory, with its prompter and its config."""

    network: TextLM
    prompter: TextPrompter
    config: dict[str, Any]  # config.json

    def prompts(self, queries: list[str], texts: list[list[str]]) -> list[list[int]]:
        """Return the token ids of the prompt for each query and its passages.

        Args:
            queries: the queries.
            texts: for each query, the texts of its passages.

        Raises ValueError if a prompt and its longest possible answer together are longer than the model's maximum
        input length.
        """
        prompts, limit = self.prompter.tokenized(queries, texts), position_limit(self.network.body.config)
        for ids, query, shown in zip(prompts, queries, texts, strict=True):
            answer = LONGEST_IDENTIFIER * len(shown)
            if len(ids) + answer > limit:
                raise ValueError(
                    f"the prompt for query {query!r} with {len(shown)} passages has {len(ids)} tokens, its answer up to"
                    f" {answer}, and the model {limit} positions; use a smaller window_size, or shorter texts"
                )
        return prompts

    def ends(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        said = self.config.get("eos_token_id")
        ends = {self.prompter.tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])}
        return sorted(ends - {None})

    def answers(self, written: list[list[int]]) -> list[str]:
        """Return the texts of generated answers. `written` has the token ids of each answer. An answer is read up to
        its first end token."""
        ends = self.ends()
        kept = [ids[: next((at for at, id in enumerate(ids) if id in ends), None)] for ids in written]
        return [str(self.prompter.tokenizer.decode(ids)) for ids in kept]

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizer into an existing folder, in the format of transformers."""
        weights = self.network.model.state_dict()
        names = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}  # one name for each tensor
        save_checkpoint(folder, self.config, {name: weights[name] for name in names.values()})
        self.prompter.tokenizer.save_pretrained(folder)


def read_text_lm(folder: Folder, device: torch.device, dtype: torch.dtype) -> TextCheckpoint:
    """Load a causal language model with a chat template.

    Args:
        folder: the folder of the checkpoint.
        device: the device of the network.
        dtype: the dtype of the weights.

    Raises ValueError if the model is not a causal language model of transformers or has no chat template.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(folder.config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{folder} holds a {kind!r}; wanted a causal language model of transformers, such as 'mistral'"
        )
    weights = folder.weights()
    model = library_model(MODEL_FOR_CAUSAL_LM_MAPPING, folder.config, kind, weights, str(folder), dtype)
    prompter = read_text_prompter(folder, model.config.vocab_size)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    config.pop("_name_or_path", None)  # a local path
    return TextCheckpoint(TextLM(model).to(device).eval(), prompter, config)
