"""The command line: `python -m pyterrier_lit rerank` and `tirex`. Knows options and messages; the rooms below do the work."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pyterrier_lit.candidates import documents, read_rerank_file, read_run, topics
from pyterrier_lit.cross_encoder import CrossEncoder
from pyterrier_lit.lit5_distill import LiT5Distill
from pyterrier_lit.lit5_score import LiT5Score
from pyterrier_lit.pe_rank import PERank
from pyterrier_lit.reranker import Reranker
from pyterrier_lit.runs import CHUNK, write_run
from pyterrier_lit.tirex import candidates_in, describe, write_submission

RERANKERS: dict[str, type[Reranker]] = {
    "lit5-distill": LiT5Distill,
    "lit5-score": LiT5Score,
    "cross-encoder": CrossEncoder,
    "pe-rank": PERank,
}
SET_HERE = ("model", "text_field", "answer_field", "verbose")  # arguments that are no options of their own

Parameters = dict[str, dict[str, inspect.Parameter]]  # by name, then by reranker


def rerank(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    """Rerank the candidates in a file into a TREC run."""
    parser.add_argument(
        "--input", type=Path, required=True, help="rerank.jsonl[.gz], or a TREC run[.gz] to go with the next two"
    )
    parser.add_argument("--topics", help="qid and query: .jsonl[.gz], tab-separated, or irds:ID")
    parser.add_argument("--documents", help="docno and text: .jsonl[.gz], tab-separated, or irds:ID")
    parser.add_argument("--output", type=Path, required=True, help="the run; gzipped if its name ends in .gz")
    add_reranker(parser)

    def run(arguments: argparse.Namespace) -> None:
        chosen = reranker(parser, arguments)
        if (arguments.topics is None) != (arguments.documents is None):
            parser.error("--topics and --documents go together, with a run as --input")
        if arguments.topics is None and ".jsonl" not in arguments.input.suffixes:
            parser.error(f"--input {arguments.input} is no .jsonl[.gz]; a run wants --topics and --documents with it")
        if arguments.topics is None:
            read = partial(read_rerank_file, arguments.input, arguments.depth)
        else:
            lookups = topics(arguments.topics), documents(arguments.documents)
            read = partial(read_run, arguments.input, *lookups, arguments.depth)
        print(write_run(chosen, read, arguments.output, **how(arguments)))

    return run


def tirex(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], None]:
    """Rerank as a system in TIRA does: from an input directory to run.txt and ir-metadata.yml, checked by TIRA's checker."""
    for option, variables, meaning in (
        ("--input", ("TIRA_INPUT_DATASET", "inputDataset"), "the input directory"),
        ("--output", ("TIRA_OUTPUT_DIR", "outputDir"), "the output directory"),
        ("--input-run", ("inputRun",), "the directory of an earlier system's run, for data sets without rerank.jsonl"),
    ):
        value = next((os.environ[name] for name in variables if os.environ.get(name)), None)
        parser.add_argument(
            option,
            type=Path,
            default=value and Path(value),
            required=value is None and option != "--input-run",
            help=f"{meaning}; default: ${' or $'.join(variables)}",
        )
    parser.add_argument("--dataset", help="TIRA's id of the data set; default: $TIRA_DATASET_ID, else the input's name")
    parser.add_argument("--team", default="pyterrier-lit", help="your team's name in TIRA (default %(default)s)")
    parser.add_argument(
        "--repository",
        default="https://pypi.org/project/pyterrier-lit/",
        help="where the code is (default %(default)s)",
    )
    parser.add_argument("--compress", action="store_true", help="write run.txt.gz")
    add_reranker(parser)

    def run(arguments: argparse.Namespace) -> None:
        chosen = reranker(parser, arguments)
        summary = write_submission(
            chosen,
            candidates_in(arguments.input, arguments.input_run, arguments.depth),
            arguments.output,
            description=describe(chosen, arguments.depth),
            dataset=arguments.dataset or os.environ.get("TIRA_DATASET_ID") or arguments.input.resolve().name,
            team=arguments.team,
            repository=arguments.repository,
            compress=arguments.compress,
            **how(arguments),
        )
        print(summary)

    return run


COMMANDS = (rerank, tirex)  # each adds its options to a parser and returns what is to be done with them


def add_reranker(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have: which reranker, how it is set, how the run is written."""
    parser.add_argument("--reranker", choices=RERANKERS, required=True)
    parser.add_argument("--model", help="hub id or folder; default: the reranker's published checkpoint")
    parser.add_argument("--depth", type=positive, help="candidates reranked per query; default: all")
    parser.add_argument("--system", help="last column of the run; default: reranker and model")
    parser.add_argument(
        "--chunk",
        type=positive,
        default=CHUNK,
        help="pairs reranked together and then written: more packs batches better, fewer loses less (default %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run with the same options has left"
    )
    own = parser.add_argument_group("arguments of the rerankers", "as the classes of pyterrier_lit document them")
    for name, parameters in constructor_options().items():
        defaults = ", ".join(f"{reranker} (default {given.default})" for reranker, given in parameters.items())
        kind = value_type(next(iter(parameters.values())))
        own.add_argument(flag(name), type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=defaults)


def reranker(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Reranker:
    """The reranker that the options describe."""
    given = {name: getattr(arguments, name) for name in constructor_options() if hasattr(arguments, name)}
    for name in given:
        owners = constructor_options()[name]
        if arguments.reranker not in owners:
            parser.error(f"{flag(name)} is an option of {' and '.join(owners)}, not of {arguments.reranker}")
    if arguments.model is not None:
        given["model"] = arguments.model
    return RERANKERS[arguments.reranker](**given)


def how(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `write_run` that the options give."""
    model = arguments.model or inspect.signature(RERANKERS[arguments.reranker]).parameters["model"].default
    by_itself = f"{arguments.reranker}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).resolve().name)}"
    return {"system": arguments.system or by_itself, "chunk": arguments.chunk, "resume": arguments.resume}


def constructor_options() -> Parameters:
    """The arguments that constructors take and a command line can give, by name, with the rerankers that take them."""
    found: Parameters = {}
    for name, kind in RERANKERS.items():
        for parameter in inspect.signature(kind).parameters.values():
            if parameter.name not in SET_HERE and value_type(parameter):
                found.setdefault(parameter.name, {})[name] = parameter
    return found


def value_type(parameter: inspect.Parameter) -> type | None:
    """How a word of the command line becomes a value; None for objects, such as a dense index."""
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    return next((kind for kind in (int, float, str) if kind in kinds), None)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main(words: list[str] | None = None) -> int:
    """Run one command; what goes wrong is one line on stderr, and not 0 is returned."""
    parser = argparse.ArgumentParser(
        prog="python -m pyterrier_lit", description="Neural rerankers for files of candidates."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__, allow_abbrev=False
        )
        own.set_defaults(run=command(own))
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except (OSError, ValueError, MemoryError, ImportError, KeyboardInterrupt) as error:
        told = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
        print(f"{parser.prog}: {' '.join('; '.join(told).split())}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
