"""The systems that bench.py compares. Each runs in a process of its own, in a Python environment in which it is
installed.

    python bench_systems.py FOLDER SYSTEM THREADS

FOLDER is a folder that bench_work.py wrote. The process answers each line of its input with a line of JSON. The answer
to `run` has the seconds of the run, the peak memory in GB and the scores. The answer to `cost` has the FLOPs, and the
bytes that the passes of the decoder read. Only systems of this package can answer `cost`. If the system is not
installed, the answer has only the reason.
"""

import functools
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

Run = Callable[[], list[list[float]]]  # returns the scores of each query's passages; [] if the scores are not compared
IDENTIFIER = 1.32  # mean number of T5 tokens of the identifiers 1 to 100
ANSWER = 20  # number of tokens of LiT5-Score's answer
SIZE, STRIDE = 20, 10  # of PE-Rank's windows


def main() -> None:
    folder, system, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    torch.set_num_threads(threads)
    work = json.loads((folder / "work.json").read_text()) | {"threads": threads}
    run, answer = None, {}
    for line in sys.stdin:
        try:
            if run is None:
                run = SYSTEMS[system](folder, work)
            answer = cost(run) if line.strip() == "cost" else timed(run)
        except ImportError as error:
            answer = {"not run": str(error)}
        except Exception as error:  # sentence-transformers raises a plain Exception if a backend is not installed
            if type(error) is not Exception:
                raise
            answer = {"not run": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(run: Run) -> dict[str, Any]:
    started = time.perf_counter()
    results = run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak GB": peak(), "results": results}


def peak() -> float:
    """The peak memory of this process in GB. `ru_maxrss` would include the memory of the parent process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def cost(run: Run) -> dict[str, float]:
    """The FLOPs of one run of this package, and the bytes that the passes of its decoder read. For LiT5, these are the
    bytes of weights, keys and values. For PE-Rank, only weights are counted."""
    import costs

    from pyterrier_lit.models.t5 import FiD
    from pyterrier_lit.models.vector_lm import VectorReader

    read = {"bytes": 0}

    def counted(method: Callable, size: Callable[..., int]) -> Callable:
        @functools.wraps(method)
        def inner(self, *arguments):
            read["bytes"] += size(self, *arguments)
            return method(self, *arguments)

        return inner

    def of_fid(fid: FiD, memory: Any, *_: Any) -> int:
        return numbers(fid.network.decoder.block.parameters()) + numbers([*memory.keys, *memory.values])

    def of_vectors(reader: VectorReader, *_: Any) -> int:
        return numbers(reader.network.body.layers.parameters())

    before = FiD.read, VectorReader.read
    FiD.read, VectorReader.read = counted(FiD.read, of_fid), counted(VectorReader.read, of_vectors)
    try:
        return {"flops": costs.counted(run), "bytes": read["bytes"]}
    finally:
        FiD.read, VectorReader.read = before


def numbers(tensors: Any) -> int:
    """The size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ours(**settings: Any) -> Callable[[Path, dict], Run]:
    """This package, with all queries in one call. settings: arguments of the reranker. int8=True quantises a
    cross-encoder."""

    def prepare(folder: Path, work: dict) -> Run:
        import pyterrier_lit

        arguments = {"device": "cpu", "dtype": work["dtype"], **settings}
        columns = work["passages"]
        match work["kind"]:
            case "cross-encoder":
                int8 = arguments.pop("int8", False)
                reranker = pyterrier_lit.CrossEncoder(str(folder), **arguments)
                if int8:
                    reranker = reranker.quantize(pair_frame(work))
            case "lit5-distill":
                reranker = pyterrier_lit.LiT5Distill(str(folder), window_size=100, **arguments)
            case "lit5-score":
                reranker = pyterrier_lit.LiT5Score(str(folder), **arguments)
            case "pe-rank":
                reranker, columns = pe_rank(folder, work, **arguments)
        return lambda: reranker.score(work["queries"], columns)

    return prepare


def pair_frame(work: dict) -> pd.DataFrame:
    lists = zip(work["queries"], work["passages"], strict=True)
    return pd.DataFrame([(query, text) for query, texts in lists for text in texts], columns=["query", "text"])


def pe_rank(folder: Path, work: dict, **arguments: Any) -> tuple[Any, dict[str, list]]:
    """A PERank with a random projector, and the columns `docno` and `doc_vec` of the passages. The vectors are computed
    in advance, as if they came from an index."""
    from pyterrier_lit import PERank

    torch.manual_seed(0)
    reranker = PERank.from_backbone(folder, encoder_name=f"{folder}/encoder", max_tokens=65_536, **arguments)
    encoder = reranker.load().text_encoder()
    with torch.inference_mode():
        vectors = [list(encoder.encode(encoder.pieces(texts)).cpu()) for texts in work["passages"]]
    docnos = [[f"{i}.{j}" for j in range(len(texts))] for i, texts in enumerate(work["passages"])]
    return reranker, {"docno": docnos, "doc_vec": vectors}


def sentence_transformers(backend: str, int8: bool = False) -> Callable[[Path, dict], Run]:
    """sentence-transformers' `CrossEncoder.predict` with its own batching, on one of its backends."""

    def prepare(folder: Path, work: dict) -> Run:
        if backend != "torch":
            importlib.import_module({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
        from sentence_transformers import CrossEncoder

        pairs = [[(query, text) for text in texts]
                 for query, texts in zip(work["queries"], work["passages"], strict=True)]  # fmt: skip
        model = CrossEncoder(str(folder), device="cpu", backend=backend, model_kwargs=options(backend, work))
        if backend == "torch":
            model.to(getattr(torch, work["dtype"]))
        elif int8 and backend == "onnx":
            from sentence_transformers import export_dynamic_quantized_onnx_model

            export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(folder))
            file = {"file_name": "model_qint8_avx512_vnni.onnx"}
            model = CrossEncoder(str(folder), device="cpu", backend=backend, model_kwargs=options(backend, work) | file)
        elif int8:
            quantise(model, [pair for asked in pairs for pair in asked][:64])

        def run() -> list[list[float]]:
            scores = model.predict(
                [pair for asked in pairs for pair in asked],
                activation_fn=torch.nn.Identity(), show_progress_bar=False, convert_to_tensor=True,
            ).float().tolist()  # fmt: skip
            return [[scores.pop(0) for _ in asked] for asked in pairs]

        return run

    return prepare


def options(backend: str, work: dict) -> dict[str, Any]:
    """The settings of a backend: the number of threads and, for OpenVINO, the precision. If the precision is not set,
    OpenVINO chooses it itself."""
    if backend == "openvino":
        precision = {"float32": "f32", "bfloat16": "bf16"}[work["dtype"]]
        return {"ov_config": {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": work["threads"]}}
    if backend == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = work["threads"]
        return {"provider": "CPUExecutionProvider", "session_options": session}
    return {}


def quantise(model: Any, pairs: list[tuple[str, str]]) -> None:
    """Quantise weights and activations to int8 with NNCF, OpenVINO's own tool. NNCF measures the ranges of the
    activations on the query-passage pairs."""
    import nncf

    samples = [
        {name: value.numpy() for name, value in model.tokenizer([pair], return_tensors="pt", truncation=True).items()}
        for pair in pairs
    ]
    classifier = model.model
    classifier.model = nncf.quantize(
        classifier.model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )
    classifier.request = None
    classifier.compile()


def library_t5(folder: Path, work: dict) -> Run:
    """T5 and `generate` of transformers with a KV cache, over LiT5's prompts padded to 150 tokens, one query at a time.

    The orders are not compared with ours, since the decoding is not constrained. For LiT5-Score, `generate` also
    returns the cross-attention.
    """
    from transformers.modeling_outputs import BaseModelOutput

    from pyterrier_lit.models.checkpoints import Folder
    from pyterrier_lit.models.t5 import read_t5

    t5 = read_t5(Folder(folder), torch.device("cpu"), getattr(torch, work["dtype"]))
    attentions = work["kind"] == "lit5-score"
    if attentions:
        t5.network.set_attn_implementation("eager")  # other implementations return no attention

    @torch.inference_mode()
    def run() -> list[list[float]]:
        for query, ranking in zip(work["queries"], work["passages"], strict=True):
            texts = [f"Search Query: {query} Passage: [{i}] {t} Relevance Ranking: " for i, t in enumerate(ranking, 1)]
            rows = [[*ids[:149], 1] for ids in t5.pieces(texts)]
            ids = torch.tensor([row + [0] * (150 - len(row)) for row in rows])
            states = t5.network.encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
            tokens = ANSWER if attentions else round(IDENTIFIER * len(ranking))
            t5.network.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.flatten(0, 1)[None]),
                attention_mask=(ids != 0).long().reshape(1, -1),
                min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
                output_attentions=attentions, return_dict_in_generate=attentions,
            )  # fmt: skip
        return []

    return run


def rank_llm(folder: Path, work: dict) -> Run:
    """LiT5-Distill in rank_llm. rank_llm runs on transformers 4 only."""
    from rank_llm.data import Candidate, Query, Request
    from rank_llm.rerank.listwise.rank_fid import RankFiDDistill

    reranker = RankFiDDistill(
        str(folder), context_size=150, window_size=100, stride=50, precision=work["dtype"], device="cpu"
    )
    tokens = round(IDENTIFIER * max(map(len, work["passages"])))
    reranker._answer_maxlength = reranker._llm.generation_config.min_length = tokens + 1
    reranker._tokenizer.decode = lambda ids, **options: ""  # random weights generate ids beyond the vocabulary

    def run() -> list[list[float]]:
        for query, ranking in zip(work["queries"], work["passages"], strict=True):
            candidates = [Candidate(str(i), 1 / (i + 1), {"contents": text}) for i, text in enumerate(ranking)]
            reranker.rerank_batch([Request(Query(query, "1"), candidates)], rank_end=len(candidates))
        return []

    return run


def procedure(folder: Path, work: dict) -> Run:
    """PE-Rank as in its published code, one window at a time. For each window of n passages, the passages are encoded
    again. Then n + 1 forward passes follow, with a KV cache. Each forward pass computes logits over the whole
    vocabulary at every position of its input."""
    from pyterrier_lit.windows import sliding_windows

    reranker, _ = pe_rank(folder, work, device="cpu", dtype=work["dtype"])
    ranker, network, encoder = reranker.load(), reranker.load().network, reranker.load().text_encoder()
    head = torch.randn(32_000, network.body.config.hidden_size).to(next(network.parameters()))

    def window_order(query: str, texts: list[str]) -> list[int]:
        vectors = encoder.encode(encoder.pieces(texts))
        passages = network.projector(torch.nn.functional.normalize(vectors, dim=1).to(head.dtype))
        table = torch.cat([head, passages])  # the vocabulary, and an entry for each passage
        ids = torch.tensor([ranker.prompter.ids([query], [[]], [len(texts)])[0]])
        inputs = network.body.get_input_embeddings()(ids)
        inputs[ids == network.placeholder] = passages
        cache, free, order = None, list(range(len(texts))), []
        for _ in range(len(texts) + 1):  # the last pass generates the end of the answer
            states, cache = read_on(network.body, cache, inputs_embeds=inputs)
            logits = (states @ table.T).float()[-1]
            if not free:
                break
            mask = torch.full_like(logits, float("-inf"))
            mask[[len(head) + j for j in free]] = 0
            order.append(int((logits + mask).argmax()) - len(head))
            free.remove(order[-1])
            inputs = passages[order[-1]][None, None]
        return order

    @torch.inference_mode()
    def run() -> list[list[float]]:
        results = []
        for query, texts in zip(work["queries"], work["passages"], strict=True):
            ranking = list(range(len(texts)))
            for window in sliding_windows(len(texts), SIZE, STRIDE):
                shown = ranking[window.start : window.stop]
                order = window_order(query, [texts[number] for number in shown])
                ranking[window.start : window.stop] = [shown[j] for j in order]
            results.append([-float(ranking.index(number)) for number in range(len(texts))])
        return results

    return run


def passages_as_text(folder: Path, work: dict) -> Run:
    """A listwise reranker that reads the texts of the passages, where PE-Rank reads their vectors. A model with random
    weights generates no correct answer, so each answer gets as many tokens as a correct one has."""
    from pyterrier_lit.windows import sliding_windows

    reranker, _ = pe_rank(folder, work, device="cpu", dtype=work["dtype"])
    ranker, body = reranker.load(), reranker.load().network.body
    head = torch.randn(32_000, body.config.hidden_size).to(next(body.parameters()))
    answer = ranker.prompter.tokenizer(" > ".join(f"[{i}]" for i in range(1, SIZE + 1)), add_special_tokens=False)

    @torch.inference_mode()
    def run() -> list[list[float]]:
        for query, texts in zip(work["queries"], work["passages"], strict=True):
            for window in sliding_windows(len(texts), SIZE, STRIDE):
                ids = torch.tensor([text_prompt(ranker.prompter.tokenizer, query, texts[window.start : window.stop])])
                cache = None
                for _ in answer["input_ids"]:
                    states, cache = read_on(body, cache, input_ids=ids)
                    ids = (states[-1] @ head.T).argmax()[None, None]
        return []

    return run


def text_prompt(tokenizer: Any, query: str, texts: list[str]) -> list[int]:
    passages = "".join(f"Passage {i}: {' '.join(text.split())}\n\n" for i, text in enumerate(texts, 1))
    n = len(texts)
    content = (
        f"I will provide you with {n} passages.\nRank the passages based on their relevance to the search query:"
        f" {query}.\n{passages}Search Query: {query}.\nRank the {n} relatively ordered passages above based on their"
        " relevance to the search query, output the ranking in descending order. The output format should be [] > [] >"
        f" ..., e.g., [4] > [2] > ..., Only respond with the ranking results with {n} unique numbers, do not say"
        " anything else or explain.\n\n"
    )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def read_on(body: Any, cache: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Process new inputs after those in the KV cache. Returns the hidden states of the new inputs, and the extended
    cache. The name of the cache argument differs between versions of transformers."""
    name = "cache" if "cache" in inspect.signature(type(body).forward).parameters else "past_key_values"
    read = body(**inputs, **{name: cache}, use_cache=True)
    return read.last_hidden_state[0], read[name]


SYSTEMS: dict[str, Callable[[Path, dict], Run]] = {
    "ours": ours(),
    "ours, int8": ours(int8=True),
    "ours, top_k=10": ours(top_k=10),
    'ours, decoding="first"': ours(decoding="first"),
    "sentence-transformers": sentence_transformers("torch"),
    "ONNX": sentence_transformers("onnx"),
    "ONNX int8": sentence_transformers("onnx", int8=True),
    "OpenVINO": sentence_transformers("openvino"),
    "OpenVINO int8": sentence_transformers("openvino", int8=True),
    "library's T5": library_t5,
    "rank_llm": rank_llm,
    "published procedure": procedure,
    "passages as text": passages_as_text,
}

if __name__ == "__main__":
    main()
