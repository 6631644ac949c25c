"""PE-Rank with random weights: ours beside the procedure of the paper, and text beside embeddings. Run by hand.

    python experiments/bench_pe_rank.py ../shared/data/dl19 --tokenizer tokenizer.model --vocab vocab.txt
        [--queries 8] [--layers 8] [--hidden 512]

The folder holds docs.jsonl.gz, queries.tsv and run.txt; the tokenizer is Mistral's first SentencePiece model, as in the
package mistral-common (data/tokenizer.model.v1), and --vocab BERT's vocab.txt for the encoder. Without these the tests'
tokenizers are used, which cut texts into more pieces.

naive           one window at a time: its passages are encoded anew, n + 1 forward passes with a cache, each of which
                makes the logits of the whole vocabulary at every position it reads, as transformers 4.37 did for the
                published code, on `--naive` queries
ours            PERank on all queries at once, vectors from an index; besides with top_k=10, that at one passage a pass,
                with the encoder, and with decoding="first", which reads the prompts and little else: the floor
text            the uncompressed listwise baseline: the same windows of texts, an answer of identifiers, on `--naive`
                queries
"""

import argparse
import gzip
import inspect
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import bench_drafts
import measured
import torch
import transformers

from pyterrier_lit import PERank
from pyterrier_lit.windows import sliding_windows

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "pe_rank"
VOCABULARY = 32_000
SIZE, STRIDE, TOP = 20, 10, 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--naive", type=int, default=1, help="how many of the queries the slow systems do")
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--repeat", type=int, default=3, help="the fastest of so many runs counts; others may share the machine"
    )
    parser.add_argument("--no-text", action="store_true", help="leave the text baseline out")
    measured.add_option(parser)
    arguments = parser.parse_args()
    queries, docnos, texts = read(arguments.data, arguments.queries, arguments.passages)
    with tempfile.TemporaryDirectory() as folder:
        make_backbone(Path(folder), arguments)
        make_encoder(Path(folder) / "encoder", arguments.vocab)
        torch.manual_seed(0)
        reranker = PERank.from_backbone(
            folder, encoder_name=f"{folder}/encoder", device=arguments.device, dtype=arguments.dtype, max_tokens=65_536
        )
    measure(reranker, queries, docnos, texts, arguments)


def measure(reranker, queries, docnos, texts, arguments):
    ranker, network = reranker.load(), reranker.load().network
    head = torch.randn(VOCABULARY, network.body.config.hidden_size).to(next(network.parameters()))
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, {arguments.device}, {arguments.dtype}; language"
        f" model of {parameters:.0f} M parameters; {len(queries)} queries of {arguments.passages} passages"
    )
    encoder = ranker.text_encoder()
    with torch.inference_mode():
        started = time.perf_counter()
        vectors = [
            torch.cat([encoder.encode(encoder.pieces(some[i : i + 20])) for i in range(0, len(some), 20)])
            for some in texts
        ]
        encoding = (time.perf_counter() - started) / len(queries)
    columns = {"docno": docnos, "doc_vec": [list(rows.cpu()) for rows in vectors]}
    reranker.order(queries[:1], {name: values[:1] for name, values in columns.items()})  # warm up
    few = slice(arguments.naive)
    rows, orders = {}, {}
    tokens = sum(
        len(ranker.prompter.ids([query], [[]], [window.stop - window.start])[0])
        for query, ranking in zip(queries, docnos, strict=True)
        for window in sliding_windows(len(ranking), SIZE, STRIDE)
    ) / len(queries)

    def timed(name, tokens, count, function):
        seconds = []
        for _ in range(arguments.repeat):
            started = time.perf_counter()
            orders[name] = function()
            seconds.append(time.perf_counter() - started)
        rows[name] = min(seconds) / count, tokens
        print(f"{name:28} {rows[name][0]:8.2f} s a query  {tokens:8.0f} prompt tokens a query", flush=True)

    def ours(**change):
        changed = reranker.__class__(**{a.name: a.value for a in transformer_attributes(reranker)} | change)
        changed.hold(ranker)
        return changed

    timed(
        "naive",
        tokens,
        arguments.naive,
        lambda: [naive(ranker, head, *asked) for asked in zip(queries[few], texts[few], strict=True)],
    )
    timed("ours, one query at a time", tokens, arguments.naive, lambda: [
        ours().order([query], {name: [values[i]] for name, values in columns.items()})[0]
        for i, query in enumerate(queries[few])
    ])  # fmt: skip
    timed("ours", tokens, len(queries), lambda: ours().order(queries, columns))
    timed("ours, top_k=10", tokens, len(queries), lambda: ours(top_k=TOP).order(queries, columns))
    with bench_drafts.counted(bench_drafts.WAYS["one symbol a pass"]):
        timed("ours, top_k=10, undrafted", tokens, len(queries), lambda: ours(top_k=TOP).order(queries, columns))
    timed(
        "ours, top_k=10, encoding",
        tokens,
        len(queries),
        lambda: ours(top_k=TOP).order(queries, {"docno": docnos, "text": texts}),
    )
    timed("ours, first", tokens, len(queries), lambda: ours(decoding="first").order(queries, columns))
    for name in list(rows)[1:]:
        same = [left[:TOP] == right[:TOP] for left, right in zip(orders["naive"], orders[name][few], strict=True)]
        whole = [left == right for left, right in zip(orders["naive"], orders[name][few], strict=True)]
        print(
            f"{name:28} {rows['naive'][0] / rows[name][0]:6.2f} x naive; of {len(same)} queries the same top 10:"
            f" {sum(same)}, the same order: {sum(whole)}"
        )
    print(f"encoding 100 passages once: {encoding:.2f} s a query")
    if not arguments.no_text:
        text_tokens, answer = text_sizes(ranker, queries[0], texts[0])
        timed("text, one query at a time", text_tokens, arguments.naive, lambda: [
            as_text(ranker, head, query, some, answer) for query, some in zip(queries[few], texts[few], strict=True)
        ])  # fmt: skip
        seconds, read_tokens = rows["text, one query at a time"]
        for name in ("naive", "ours, one query at a time", "ours, top_k=10"):
            print(
                f"text against {name:28}: {seconds / rows[name][0]:6.2f} x the seconds,"
                f" {read_tokens / tokens:.2f} x the prompt tokens"
            )
    if arguments.record:
        record(rows, len(queries))


def record(rows, n):
    """Append seconds and prompt tokens of each system to measured.csv."""
    names = ("seconds a query", "prompt tokens a query")
    measured.record(
        "PE-Rank against the paper's procedure, and text against vectors",
        [
            {"setting": system, "n": n, "measure": name, "value": value}
            for system, values in rows.items()
            for name, value in zip(names, values, strict=True)
        ],
    )


@torch.inference_mode()
def naive(ranker, head, query, texts):
    """The order of one list by the paper's procedure, as its published code goes about it."""
    network, encoder = ranker.network, ranker.text_encoder()
    body, device = network.body, head.device
    ranking = list(range(len(texts)))
    for window in sliding_windows(len(texts), SIZE, STRIDE):
        shown = ranking[window.start : window.stop]
        vectors = encoder.encode(encoder.pieces([texts[number] for number in shown]))
        passages = network.projector(torch.nn.functional.normalize(vectors, dim=1).to(head.dtype))
        table = torch.cat([head, passages])  # the vocabulary grows by the passages
        ids = torch.tensor([ranker.prompter.ids([query], [[]], [len(shown)])[0]], device=device)
        inputs = body.get_input_embeddings()(ids)
        inputs[ids == network.placeholder] = passages
        cache, free, order = None, list(range(len(shown))), []
        for _ in range(len(shown) + 1):  # the last one writes the end of the answer
            states, cache = read_on(body, cache, inputs_embeds=inputs)
            logits = (states @ table.T).float()[-1]
            if not free:
                break
            mask = torch.full_like(logits, float("-inf"))
            mask[[VOCABULARY + j for j in free]] = 0
            order.append(int((logits + mask).argmax()) - VOCABULARY)
            free.remove(order[-1])
            inputs = passages[order[-1]][None, None]
        ranking[window.start : window.stop] = [shown[j] for j in order]
    return ranking


def text_prompt(ranker, query, texts):
    passages = "".join(f"Passage {i}: {' '.join(text.split())}\n\n" for i, text in enumerate(texts, 1))
    n = len(texts)
    content = (
        f"I will provide you with {n} passages.\nRank the passages based on their relevance to the search query:"
        f" {query}.\n{passages}Search Query: {query}.\nRank the {n} relatively ordered passages above based on their"
        " relevance to the search query, output the ranking in descending order. The output format should be [] > [] >"
        f" ..., e.g., [4] > [2] > ..., Only respond with the ranking results with {n} unique numbers, do not say"
        " anything else or explain.\n\n"
    )
    tokenizer = ranker.prompter.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def text_sizes(ranker, query, texts):
    """Prompt tokens of all windows of a list, and the tokens of an answer that names 20 passages."""
    windows = sliding_windows(len(texts), SIZE, STRIDE)
    prompts = [text_prompt(ranker, query, texts[window.start : window.stop]) for window in windows]
    answer = " > ".join(f"[{i}]" for i in range(1, SIZE + 1))
    return sum(map(len, prompts)), len(ranker.prompter.tokenizer(answer, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def as_text(ranker, head, query, texts, answer):
    """The listwise baseline over texts: random weights write no order, so the answer has the length of a right one."""
    body = ranker.network.body
    for window in sliding_windows(len(texts), SIZE, STRIDE):
        ids = torch.tensor([text_prompt(ranker, query, texts[window.start : window.stop])], device=head.device)
        cache = None
        for _ in range(answer):
            states, cache = read_on(body, cache, input_ids=ids)
            ids = (states[-1] @ head.T).argmax()[None, None]
    return list(range(len(texts)))


def read_on(body, cache, **inputs):
    """The states of new inputs after those in the cache, and the grown cache, whatever transformers calls it."""
    name = "cache" if "cache" in inspect.signature(type(body).forward).parameters else "past_key_values"
    read = body(**inputs, **{name: cache}, use_cache=True)
    return read.last_hidden_state[0], read[name]


def transformer_attributes(reranker):
    import pyterrier as pt

    return pt.inspect.transformer_attributes(reranker)


def read(folder, count, depth):
    """The first queries of a run with `depth` passages each: queries, docnos, texts."""
    with gzip.open(folder / "docs.jsonl.gz", "rt", encoding="utf-8") as file:
        text_of = {row["docno"]: row["text"] for row in map(json.loads, file)}
    query_of = dict(line.split("\t", 1) for line in (folder / "queries.tsv").read_text(encoding="utf-8").splitlines())
    ranked = {}
    for line in (folder / "run.txt").read_text().splitlines():
        qid, _, docno, *_ = line.split()
        ranked.setdefault(qid, []).append(docno)
    full = {
        qid: docnos[:depth]
        for qid, docnos in ranked.items()
        if len(docnos) >= depth and set(docnos[:depth]) <= text_of.keys()
    }
    qids = list(full)[:count]
    return (
        [query_of[qid] for qid in qids],
        [full[qid] for qid in qids],
        [[text_of[d] for d in full[qid]] for qid in qids],
    )


def make_backbone(folder, arguments):
    """A Mistral with random weights, and a tokenizer with Mistral's chat template."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(arguments.hidden // 64, 1),
        num_key_value_heads=max(arguments.hidden // 256, 1),
        rope_theta=1e6,
        initializer_range=0.05,
    )
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    shutil.copy(arguments.tokenizer or GOLDEN / "checkpoint" / "tokenizer.model", folder / "tokenizer.model")
    fields = json.loads((GOLDEN / "checkpoint" / "tokenizer_config.json").read_text())
    fields["added_tokens_decoder"] = {id: token for id, token in fields["added_tokens_decoder"].items() if int(id) < 3}
    fields["additional_special_tokens"] = []
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def make_encoder(folder, vocabulary):
    """A BERT with random weights, small beside the language model as Jina's is beside Mistral-7B."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=30_522,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    shutil.copy(vocabulary or GOLDEN / "encoder" / "vocab.txt", folder / "vocab.txt")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
