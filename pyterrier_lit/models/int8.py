"""A cross-encoder's network in int8 for CPUs: NNCF quantises weights and activations, and OpenVINO computes scores.

On a CPU with VNNI instructions, a matrix product in int8 takes about a quarter of the time of one in float32. The
ranges of the activations are measured on some query-passage pairs, the calibration pairs. Operations other than matrix
products are computed in float32. Shapes: B is the number of query-passage pairs in a batch, and L their length in
tokens including padding.
"""

import contextlib
import importlib
import logging
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyterrier_lit.models.checkpoints import INT8_FILES, Folder
from pyterrier_lit.models.errors import damaged
from pyterrier_lit.models.pair_networks import READ_FIRST, LabelScorer, PooledScorer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
GRAPH, WEIGHTS = INT8_FILES


class Int8Scorer(nn.Module):
    """The network of a cross-encoder in int8, which OpenVINO runs on the CPU. The network has no parameters of torch,
    so it cannot be trained.

    Args:
        graph: the content of int8.xml, the network's graph in OpenVINO's format.
        weights: the content of int8.bin, the network's weights in OpenVINO's format.
        pad_id: the id of the padding token, or None.

    Raises ImportError if OpenVINO is not installed, and RuntimeError if OpenVINO cannot read the network. Raises
    ValueError if the inputs of the network are not input_ids, attention_mask and token_type_ids, or if its output is
    not one score per pair.
    """

    def __init__(self, graph: bytes, weights: bytes, pad_id: int | None):
        super().__init__()
        self.graph, self.weights, self.pad_id = graph, weights, pad_id
        core = _module("openvino").Core()
        self._compiled = core.compile_model(
            core.read_model(graph, weights),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": False,  # else two processes may choose the same core
            },
        )
        names = sorted(each.any_name for each in self._compiled.inputs)
        ranks = [each.partial_shape.rank.get_length() for each in self._compiled.outputs]
        if names != sorted(INPUTS) or ranks != [1]:
            raise ValueError(
                f"a network in int8 reads {', '.join(names)} and returns tensors of ranks {ranks}; wanted one that"
                f" reads {', '.join(INPUTS)} and returns one score for each pair"
            )
        self._requests = threading.local()  # a request of OpenVINO serves one thread at a time

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Score B query-passage pairs: input_ids, attention_mask and token_type_ids, each (B, L) -> float32 scores
        (B,)."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        tensors = (input_ids, attention_mask, token_type_ids)
        found = self._requests.own.infer({name: tensor.numpy() for name, tensor in zip(INPUTS, tensors, strict=True)})
        return torch.from_numpy(found[0].copy())

    def save(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Write the network into an existing folder, in OpenVINO's format. Returns `config`, unchanged."""
        (folder / GRAPH).write_bytes(self.graph)
        (folder / WEIGHTS).write_bytes(self.weights)
        return config

    def __reduce__(self) -> tuple[type["Int8Scorer"], tuple[bytes, bytes, int | None]]:
        return Int8Scorer, (self.graph, self.weights, self.pad_id)


def quantized(network: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> Int8Scorer:
    """Quantise the network of a cross-encoder to int8. For a network of MiniLM's size, this takes about 10 seconds.

    Args:
        network: the network, in float32 on the CPU.
        batches: the calibration pairs in batches. A batch has a tensor (B, L) for each name in INPUTS.

    Raises ImportError if OpenVINO or NNCF is not installed. Raises ValueError if the encoder's model type is not in
    `pair_networks.READ_FIRST`, or if the network is in int8 already.
    """
    ov, nncf = _module("openvino"), _module("nncf")
    if not isinstance(network, PooledScorer | LabelScorer):
        raise ValueError("the reranker is in int8 already")
    kind = (network.body if isinstance(network, PooledScorer) else network.model).config.model_type
    if kind not in READ_FIRST:
        raise ValueError(f"a network of type {kind!r} cannot be quantised; wanted one of {', '.join(READ_FIRST)}")
    with _quiet():
        graph = ov.convert_model(
            network, example_input=batches[0], input=[(name, [-1, -1], ov.Type.i64) for name in INPUTS]
        )
        calibration = nncf.Dataset([{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches])
        graph = nncf.quantize(
            graph,
            calibration,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            # A CPU without VNNI adds products of int8 in 16 bits. Weights of 7 bits do not overflow there
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(graph, Path(folder) / GRAPH, compress_to_fp16=False)
        return read_int8(Folder(folder), network.pad_id)


def read_int8(folder: Folder, pad_id: int | None) -> Int8Scorer:
    """Load the int8 network in a folder. `pad_id` is the id of the padding token, or None.

    Raises FileNotFoundError if int8.xml or int8.bin is missing. Raises ValueError if one of these files is damaged, or
    if the network is not a cross-encoder. Raises ImportError if OpenVINO is not installed.
    """
    absent = [name for name in (GRAPH, WEIGHTS) if not (folder.path / name).exists()]
    if absent:
        raise folder.missing(" and ".join(absent))
    graph, weights = ((folder.path / name).read_bytes() for name in (GRAPH, WEIGHTS))
    try:
        return Int8Scorer(graph, weights, pad_id)
    except RuntimeError as error:
        raise damaged(folder.path / f"{GRAPH} or {WEIGHTS}", error) from error


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"int8 needs {name}: pip install 'pyterrier-lit[int8]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable gradients, hide Python's warnings, and let NNCF log only errors. OpenVINO traces a network with one
    example input. Torch then warns that other inputs may take other branches in the code. In these networks, all inputs
    take the same branches."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
