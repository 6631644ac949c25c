"""Reads and writes PE-Rank's checkpoints: language model, prompts and passage encoder.

The checkpoints have the same format as those of liuqi6777/pe_rank, the code of PE-Rank's authors.
"""

import dataclasses
import json
import os.path
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch

from pyterrier_lit.models.checkpoints import HUB_ID, Folder, fetch, fetch_from_hub, save_checkpoint
from pyterrier_lit.models.library import (
    Weights,
    below,
    build,
    library_body,
    library_model,
    load_strictly,
    position_limit,
)
from pyterrier_lit.models.pe_prompts import Prompter, read_prompter
from pyterrier_lit.models.text_encoder import TextEncoder, bare, read_text_encoder, text_encoder
from pyterrier_lit.models.tokenization import no_panic
from pyterrier_lit.models.vector_lm import VectorLM, projector

ENCODER, PROJECTOR = "model.encoder.encoder.", "model.projector."  # prefixes of the names of weights
ENCODER_TOKENIZER = "encoder_tokenizer.json"
KIND = "embed_"  # the prefix of the model_type of a PE-Rank: "embed_mistral" if its language model is a "mistral"


@dataclasses.dataclass(eq=False)
class PERankCheckpoint:
    """A PE-Rank model in memory: its language model with projector, its prompts, and its passage encoder."""

    network: VectorLM
    prompter: Prompter
    config: dict[str, Any]  # config.json
    folder: Folder
    encoder_weights: Weights  # the weights of the passage encoder, or {} if the checkpoint has no encoder
    encoder: TextEncoder | None = None  # None if the encoder is not built yet

    @property
    def embedding_size(self) -> int:
        """The dimension of the passage vectors."""
        size: int = self.config["embedding_size"]
        return size

    @property
    def trained_on(self) -> str:
        """A description of the passage encoder that the checkpoint was trained with, for messages."""
        name = self.config.get("encoder_name")
        return (
            f"{name} ({self.config.get('encoder_pooling', 'mean')} pooling)"
            if name
            else "the encoder it was trained with"
        )

    def warn_of_other_encoders(self) -> None:
        """Warn that the vectors in a column or a dense index must come from the encoder that the checkpoint was trained
        with. With vectors of another encoder, the order of the passages is meaningless. There is no warning if the
        config of the checkpoint does not name an encoder."""
        if self.config.get("encoder_name"):
            warnings.warn(
                "neither a 'doc_vec' column nor an index says which encoder made its vectors; this checkpoint reads"
                f" those of {self.trained_on}",
                stacklevel=2,
            )

    def prompts(self, queries: list[str], texts: list[list[str]], counts: list[int]) -> list[list[int]]:
        """Return the token ids of the prompt for each query and its n passages.

        Args:
            queries: the queries.
            texts: for each query, the texts of its passages, or an empty list for a prompt without texts.
            counts: for each query, the number n of its passages.

        Raises ValueError if a prompt together with its answer of n tokens is longer than `limit()`.
        """
        prompts = self.prompter.ids(queries, texts, counts)
        limit = self.limit()
        for ids, query, n in zip(prompts, queries, counts, strict=True):
            if len(ids) + n > limit:
                raise ValueError(
                    f"the prompt for query {query!r} with {n} passages has {len(ids)} tokens and the model {limit}"
                    " positions; use a smaller window_size, or shorter texts"
                )
        return prompts

    def limit(self) -> float:
        """Return the maximum length in tokens of a prompt together with its answer, which has one token per passage."""
        return position_limit(self.network.body.config)

    def text_encoder(self) -> TextEncoder:
        """Return the passage encoder inside the checkpoint. The encoder is built on first use, because it is not needed
        if the vectors are given. Raises ValueError if the checkpoint has no encoder. Raises FileNotFoundError if the
        config or the tokenizer of the encoder is not available."""
        if self.encoder is None:
            self.encoder = _inner_encoder(self)
        return self.encoder

    def head(self) -> torch.Tensor:
        """Return the weight matrix (vocabulary size, width) of the language model's output layer. PE-Rank does not use
        this layer for ranking. If the output layer is tied to the input embedding, both have the same matrix.
        Otherwise, the matrix is read from the checkpoint.

        Raises ValueError if the checkpoint has no output layer.
        """
        words: Any = self.network.body.get_input_embeddings()
        tied = self.config.get("tie_word_embeddings")
        weight = words.weight.detach() if tied else self.folder.weight("lm_head.weight")
        if weight is None:
            raise ValueError(
                f"{self.folder} has no lm_head.weight, because `save` leaves it out of a PE-Rank: run alignment right"
                " after PERank.from_backbone, before you save"
            )
        return weight

    def save(self, folder: Path) -> None:
        """Write the checkpoint into an existing folder: config, weights and tokenizer of the language model, and those
        of the passage encoder.

        If the config or the tokenizer of the encoder is not available, there is a warning. The saved checkpoint then
        has the encoder's weights and name, which do not suffice to encode passages.
        """
        if self.encoder_weights:
            try:
                self.text_encoder()
            except (FileNotFoundError, ValueError) as error:
                warnings.warn(f"saved without the files of the encoder: {error}", stacklevel=2)
        parts = {"model.": self.network.body, PROJECTOR: self.network.projector}
        weights = {prefix + name: w for prefix, part in parts.items() for name, w in part.state_dict().items()}
        weights |= {ENCODER + name: tensor for name, tensor in self.encoder_weights.items()}
        config = self.config
        if self.encoder:
            config = config | {"encoder_config": self.encoder.config}
            self.encoder.tokenizer.save(str(folder / ENCODER_TOKENIZER))
        save_checkpoint(folder, config, weights)
        self.prompter.tokenizer.save_pretrained(folder)


def read_pe_rank(folder: Folder, device: torch.device, dtype: torch.dtype) -> PERankCheckpoint:
    """Load a trained PE-Rank.

    Args:
        folder: the folder of the checkpoint.
        device: the device of the network.
        dtype: the dtype of the weights.

    Raises ValueError if the checkpoint is not a PE-Rank.
    """
    import transformers

    kind = str(folder.config.get("model_type"))
    if not kind.startswith(KIND):
        raise ValueError(
            f"{folder} holds {folder.config.get('architectures')} (model_type {kind!r}), which is not a PE-Rank"
            f" checkpoint; wanted a model_type such as '{KIND}mistral'. To train one on a language model:"
            " PERank.from_backbone"
        )
    weights = folder.weights()
    others = (ENCODER, PROJECTOR, "lm_head.")
    body_weights = {name.removeprefix("model."): w for name, w in weights.items() if not name.startswith(others)}
    kind = kind.removeprefix(KIND)
    _check_kind(folder, kind)
    # The position tables of the body stay in float32, regardless of `dtype`
    body = library_model(transformers.MODEL_MAPPING, folder.config, kind, body_weights, str(folder), dtype)
    hidden = body.config.hidden_size
    config = {"embedding_size": hidden} | folder.config
    head_kind = config.get("projector_type", "identity") if config.get("use_proj", True) else "identity"
    head_weights, source = below(weights, PROJECTOR), f"{folder} (projector)"
    head = build(lambda: projector(head_kind, config["embedding_size"], hidden), {}, head_weights, source)
    load_strictly(head, head_weights, source)
    prompter = read_prompter(folder, body.config.vocab_size)
    network = VectorLM(body, head.to(dtype), prompter.placeholder).to(device).eval()
    return PERankCheckpoint(network, prompter, config, folder, bare(below(weights, ENCODER)))


def new_pe_rank(
    folder: Folder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    encoder_name: str | None = None,
    encoder_pooling: str = "mean",
    embedding_size: int | None = None,
    projector_type: str = "mlp2x_gelu",
) -> PERankCheckpoint:
    """Return a new PE-Rank: a pre-trained causal language model with an untrained projector.

    Args:
        folder: the folder of the language model.
        device: the device of the networks.
        dtype: the dtype of the weights.
        encoder_name: hub id or folder of the passage encoder, such as sentence-transformers/all-MiniLM-L6-v2.
        encoder_pooling: how the encoder's hidden states are pooled into a vector: "mean", "cls" or "last_token".
        embedding_size: the dimension of the vectors, if no encoder is given.
        projector_type: "linear", "mlp2x_gelu" (with any digit from 1 to 9 in place of 2) or "identity".

    Raises ValueError if neither `encoder_name` nor `embedding_size` is given, or if transformers does not have the
    model type of the language model.
    """
    encoder, encoder_weights = None, {}
    if encoder_name:
        encoder = read_text_encoder(fetch(encoder_name), encoder_pooling)
        encoder_weights = encoder.network.state_dict()  # in their stored dtype
        encoder.network.to(device, dtype).eval()
        embedding_size = encoder.config["hidden_size"]
    if not embedding_size:
        raise ValueError(
            "embedding_size=None without encoder_name=; one of them must give the dimension of the vectors"
        )
    kind = str(folder.config.get("model_type"))
    _check_kind(folder, kind)
    body = library_body(folder.config, folder.weights(), str(folder), dtype)
    prompter = read_prompter(folder, body.config.vocab_size, add=True)
    body.resize_token_embeddings(max(body.config.vocab_size, prompter.n_ids), mean_resizing=False)
    head = projector(projector_type, embedding_size, body.config.hidden_size)
    config = json.loads(body.config.to_json_string(use_diff=False)) | {
        "model_type": KIND + kind,
        "architectures": [f"Embed{kind.capitalize()}ForRankLM"],
        "encoder_name": encoder_name,
        "encoder_pooling": encoder_pooling,
        "embedding_size": embedding_size,
        "projector_type": projector_type,
    }
    config.pop("_name_or_path", None)  # a local path
    network = VectorLM(body, head.to(dtype), prompter.placeholder).to(device).eval()
    return PERankCheckpoint(network, prompter, config, folder, encoder_weights, encoder)


def _inner_encoder(checkpoint: PERankCheckpoint) -> TextEncoder:
    """Build the passage encoder of a checkpoint from the encoder weights in the checkpoint.

    If `save` wrote the encoder's config and tokenizer into the checkpoint, they are read from the checkpoint. If not,
    they are read from the hub id or folder `encoder_name` in the checkpoint's config. Raises ValueError if the
    checkpoint has no weights of an encoder.
    """
    folder, name = checkpoint.folder, checkpoint.config.get("encoder_name")
    if not checkpoint.encoder_weights:
        raise ValueError(
            f"{folder} holds no encoder; give the passages' vectors as vectors= or in a 'doc_vec' column, or an"
            " encoder="
        )
    if "encoder_config" in checkpoint.config:
        config, file = checkpoint.config["encoder_config"], folder.path / ENCODER_TOKENIZER
        if not file.exists():
            raise folder.missing(f"{ENCODER_TOKENIZER}, of the encoder inside")
        with no_panic("any text"):
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
    else:
        source = _encoder_folder(folder, name)
        config, tokenizer = source.config, source.tokenizer()
    pooling = checkpoint.config.get("encoder_pooling", "mean")
    encoder = text_encoder(config, checkpoint.encoder_weights, tokenizer, pooling, f"{folder} (encoder {name})")
    weight = next(checkpoint.network.parameters())
    encoder.network.to(weight.device, weight.dtype).eval()
    return encoder


def _encoder_folder(folder: Folder, name: Any) -> Folder:
    """Return the folder with the config and the tokenizer of a checkpoint's encoder.

    `name` is the field `encoder_name` of the checkpoint's config. It must be a hub id, or a folder inside or next to
    the checkpoint's folder. Raises ValueError for any other name, because a checkpoint must not cause other local files
    to be read.
    """
    home = Path(os.path.abspath(folder.path))
    if isinstance(name, str) and not Path(name).is_absolute():
        near = [Path(os.path.normpath(place / name)) for place in (home, home.parent)]
        for place in near:
            if home.parent in place.parents and place != home and place.is_dir():
                return Folder(place)
        if HUB_ID.fullmatch(name):
            use = f"put it at {folder.path / name}, or give the passages' vectors as vectors= or an encoder="
            return fetch_from_hub(name, weights=False, use=use)
    raise ValueError(
        f"{folder} names its encoder {name!r}; wanted a hub id, or a folder in the checkpoint's or beside it. Give the"
        " passages' vectors as vectors= or in a 'doc_vec' column, or the encoder as encoder="
    )


def _check_kind(folder: Folder, kind: str) -> None:
    """Raise ValueError if transformers does not have the model type `kind`. An unknown model type needs code inside the
    checkpoint, and such code is never run."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        raise ValueError(f"{folder} has a language model {kind!r}, which transformers does not know")
