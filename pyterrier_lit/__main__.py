"""The command line: `pyterrier-lit rerank`, `train` and `tirex`. This module handles only options and messages."""

import argparse
import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import pyterrier_lit
from pyterrier_lit.files.candidates import Candidates, documents, read_rerank_file, read_run, topics
from pyterrier_lit.files.rerankers import CHUNKS, check_values, chunk_for, fingerprint
from pyterrier_lit.files.runs import check_new, check_settings, write_run
from pyterrier_lit.files.teachers import is_taught
from pyterrier_lit.files.tirex import About, candidates_in, describe, run_in, write_submission
from pyterrier_lit.reranker import Reranker

RERANKERS: dict[str, type[Reranker]] = {  # name on the command line -> class
    kind.__module__.rpartition(".")[2].replace("_", "-"): kind
    for kind in (getattr(pyterrier_lit, name) for name in pyterrier_lit.__all__)
}
# Constructor arguments for which `add_reranker` does not generate an option from the constructor's signature
SET_HERE = ("model", "text_field", "answer_field", "verbose")

Parameters = dict[str, dict[str, inspect.Parameter]]  # argument name -> name of a reranker -> parameter


def rerank(parser: argparse.ArgumentParser, named: str | None) -> Callable[[argparse.Namespace], None]:
    """Rerank the candidates in a file and write a TREC run."""
    add_candidates(parser)
    parser.add_argument("--output", type=Path, required=True, help="file of the run; gzipped if its name ends in .gz")
    add_reranker(parser, named)
    add_run(parser)

    def run(arguments: argparse.Namespace) -> None:
        read = candidates(parser, arguments, arguments.input)
        described = reranker(parser, arguments)
        print(write_run(described, read, arguments.output, **run_settings(arguments, described)))

    return run


def tirex(parser: argparse.ArgumentParser, named: str | None) -> Callable[[argparse.Namespace], None]:
    """Rerank the candidates in TIRA's input directory, write run.txt and ir-metadata.yml, and check both files."""
    for option, variables, meaning in (
        ("--input", ("TIRA_INPUT_DATASET", "inputDataset"), "TIRA's input directory"),
        ("--output", ("TIRA_OUTPUT_DIR", "outputDir"), "TIRA's output directory"),
        ("--input-run", ("inputRun",), "directory with a first stage's run, for an input without rerank.jsonl"),
    ):
        value = next((os.environ[name] for name in variables if os.environ.get(name)), None)
        parser.add_argument(
            option,
            type=Path,
            default=value and Path(value),
            required=value is None and option != "--input-run",
            help=f"{meaning}; default: ${' or $'.join(variables)}",
        )
    meaning = "TIRA's id of the data set; default: $TIRA_DATASET_ID, else the name of the input directory"
    parser.add_argument("--dataset", help=meaning)
    parser.add_argument("--team", default="pyterrier-lit", help="name of your team in TIRA (default %(default)s)")
    parser.add_argument("--repository", default="pyterrier-lit", help="URL of your code (default %(default)s)")
    parser.add_argument("--compress", action="store_true", help="write run.txt.gz instead of run.txt")
    add_reranker(parser, named)
    add_run(parser)

    def run(arguments: argparse.Namespace) -> None:
        described = reranker(parser, arguments)
        settings = run_settings(arguments, described)
        check_settings(settings["system"], settings["chunk"])
        check_new(run_in(arguments.output, arguments.compress), arguments.resume)
        read = candidates_in(arguments.input, arguments.input_run, arguments.depth)
        about = About(
            system=settings.pop("system"),
            description=describe(described, arguments.depth),
            dataset=arguments.dataset or os.environ.get("TIRA_DATASET_ID") or arguments.input.resolve().name,
            team=arguments.team,
            repository=arguments.repository,
        )
        print(write_submission(described, read, arguments.output, about, compress=arguments.compress, **settings))
        print(f"TIRA's checker accepts {arguments.output}")

    return run


def train(parser: argparse.ArgumentParser, named: str | None) -> Callable[[argparse.Namespace], None]:
    """Train a reranker on the candidates in a file, from qrels, a teacher's ranking, answers, or the passages alone."""
    add_reranker(parser, named)
    add_backbone(parser, named)
    add_candidates(parser)
    add_training(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to save the trained checkpoint to")

    def run(arguments: argparse.Namespace) -> None:
        from pyterrier_lit.training import StoredRun
        from pyterrier_lit.training.data import as_frame, read_qa, read_qrels, read_teacher

        if (arguments.valid is None) != (arguments.valid_labels is None):
            parser.error("--valid and --valid-labels go together")
        if arguments.model is not None and arguments.backbone is not None:
            parser.error("--model is trained further, --backbone from its beginning; give one of them")
        check_training(parser, arguments)
        frame: Any
        if arguments.answers:
            frame = read_qa(arguments.input)
        elif (
            arguments.topics is None
            and {".jsonl", ".json"} & set(arguments.input.suffixes)
            and is_taught(arguments.input)
        ):
            taught = read_teacher(arguments.input, arguments.teacher)
            frame = taught.assign(rank=taught["shown"])[taught["shown"] < (arguments.depth or len(taught))]
            arguments.teacher = None if arguments.labels or arguments.passages else taught
        elif arguments.topics is not None and arguments.documents is not None:
            frame = StoredRun(arguments.input, arguments.topics, arguments.documents, depth=arguments.depth)
        else:
            frame = as_frame(candidates(parser, arguments, arguments.input)())
        validation = as_frame(candidates(parser, arguments, arguments.valid)()) if arguments.valid else None
        labels, valid_labels = read_qrels(arguments.labels), read_qrels(arguments.valid_labels)
        learns = learner(student(parser, arguments), arguments)
        learns.fit(frame, labels, validation, valid_labels)
        learns.student.save(arguments.output)
        print(f"{arguments.output}: {len(learns.log)} measurements, the last {learns.log.iloc[-1].dropna().to_dict()}")

    return run


# Each of these functions adds the options of a command to a parser, and returns the function that runs the command
COMMANDS = (rerank, train, tirex)


def add_candidates(parser: argparse.ArgumentParser) -> None:
    """Add the options for the files with the candidates: --input, --topics and --documents."""
    meaning = (
        "file with the candidates (the passages to rerank for each query): rerank.jsonl[.gz], JSON in the format of"
        " rank_llm, PE-Rank or LiT5, or a TREC run[.gz] together with --topics and --documents"
    )
    parser.add_argument("--input", type=Path, required=True, help=meaning)
    meaning = "{0} of a run: file (.jsonl[.gz] or tab-separated) with {1}; or irds:ID for a data set of ir_datasets"
    parser.add_argument("--topics", help=meaning.format("queries", "qid and query"))
    parser.add_argument("--documents", help=meaning.format("documents", "docno and text"))


def candidates(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, path: Path
) -> Callable[[], Iterator[Candidates]]:
    """Returns a function that reads the candidates in a file. Each call of the returned function reads the file from
    its start.

    arguments: the parsed options. path: the file. If the options do not fit the file, the program ends with a message.
    """
    if (arguments.topics is None) != (arguments.documents is None):
        parser.error("--topics and --documents go together, with a run as --input")
    if arguments.topics is None and not {".jsonl", ".json"} & set(path.suffixes):
        parser.error(f"--input {path} is no .jsonl[.gz] or .json; a run needs --topics and --documents with it")
    if arguments.topics is None:
        return partial(read_rerank_file, path, arguments.depth)
    lookups = cache(lambda: (topics(arguments.topics), documents(arguments.documents)))
    return lambda: read_run(path, *lookups(), arguments.depth)


def add_reranker(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Add the options that every command has: the reranker, its model and its arguments.

    named: the reranker that the command line names. The help shows only the options of this reranker. If `named` is
    None, the help shows the options of all rerankers.
    """
    parser.add_argument("--reranker", choices=RERANKERS, required=True)
    meaning = "hub id or folder of a checkpoint; default: a published checkpoint of the reranker"
    parser.add_argument("--model", help=meaning)
    own = parser.add_argument_group("arguments of the rerankers", "the constructor arguments of their Python classes")
    for name, parameters in constructor_options().items():
        kind = value_types(next(iter(parameters.values())))[0]
        own.add_argument(
            flag(name),
            type=kind,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=explained(name, parameters, named),
        )


def explained(name: str, parameters: dict[str, inspect.Parameter], named: str | None) -> str:
    """The help text for an argument of the rerankers, from the docstrings of their classes.

    Args:
        name: the name of the argument.
        parameters: reranker -> parameter, for each reranker that has the argument.
        named: the reranker whose help is shown. None joins the texts of all rerankers that have the argument.

    Returns argparse.SUPPRESS if the named reranker does not have the argument.
    """
    if named is not None and named not in parameters:
        return argparse.SUPPRESS
    owners: dict[str, list[str]] = {}
    for reranker, parameter in parameters.items():
        if named in (None, reranker):
            said = documented(RERANKERS[reranker]).get(name, "")
            said = said if said.endswith("...") else said.removesuffix(".")
            owners.setdefault(f"{said} (default {parameter.default})", []).append(reranker)
    by_owner = "; ".join(f"{', '.join(rerankers)}: {said}" for said, rerankers in owners.items())
    return (next(iter(owners)) if named else by_owner).replace("%", "%%")


def documented(kind: Callable[..., Any]) -> dict[str, str]:
    """The arguments of a class or function with their descriptions, from the Args section of its docstring: name ->
    description."""
    _, _, arguments = (inspect.getdoc(kind) or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(said.split()) for names, said in entries for name in names.split(", ")}


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options for writing a run, to the commands `rerank` and `tirex`."""
    parser.add_argument("--depth", type=positive, help="maximum number of candidates to rerank per query; default: all")
    meaning = "name in the last column of the run; default: the names of the reranker and of its model"
    parser.add_argument("--system", help=meaning)
    parser.add_argument(
        "--chunk",
        type=positive,
        help="number of query-passage pairs that are reranked and then written together; with more pairs, reranking is"
        f" faster, and more is lost in a crash (default {CHUNKS['cpu']}, on a CUDA GPU {CHUNKS['cuda']:,})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume an interrupted run; options, weights and input must be the same as in the interrupted call",
    )


def add_backbone(parser: argparse.ArgumentParser, named: str | None) -> None:
    """Add the options for training a reranker from a pre-trained model."""
    parser.add_argument(
        "--backbone",
        help="hub id or folder of a pre-trained model to train from; without --backbone, --model is trained further",
    )
    for name, kind in RERANKERS.items():
        for option, parameter in kind.begin_options().items():
            said = documented(kind.begin).get(option, "").removesuffix(".")
            meaning = f"{name} with --backbone: {said} (default {parameter.default})".replace("%", "%%")
            meaning = meaning if named in (None, name) else argparse.SUPPRESS
            parser.add_argument(flag(option), type=value_types(parameter)[0], default=argparse.SUPPRESS, help=meaning)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options for the training data and the recipe."""
    taught = parser.add_mutually_exclusive_group(required=True)
    taught.add_argument("--labels", type=Path, help="learn from the qrels in this file")
    meaning = (
        "learn from the teacher's rankings in this file: a TREC run[.gz], a .jsonl[.gz] or .parquet file, or a JSON"
        " array with one of RankGPT's permutations for each record of --input"
    )
    taught.add_argument("--teacher", type=Path, help=meaning)
    meaning = (
        "learn the order of the passages in --input: the order of the candidates, or the teacher's order in the"
        " training data of RankZephyr, PE-Rank or TWOLAR"
    )
    taught.add_argument("--order", action="store_true", help=meaning)
    taught.add_argument(
        "--answers",
        action="store_true",
        help="learn to generate answers (lit5-score); --input is JSON with the fields question, answers and ctxs",
    )
    taught.add_argument("--passages", action="store_true", help="learn from the passages alone (pe-rank, stage 1)")
    parser.add_argument("--depth", type=positive, help="maximum number of candidates per query; default: all")
    meaning = "file with candidates for validation by nDCG@10, in the format of --input"
    parser.add_argument("--valid", type=Path, help=meaning)
    parser.add_argument("--valid-labels", type=Path, help="file with the qrels of the queries in --valid")
    parser.add_argument("--recipe", help="name of a training recipe; default: the recipe of the reranker's paper")
    meaning = "set a hyperparameter of the recipe, such as steps=1000; this option may be given several times"
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="NAME=VALUE", help=meaning)
    meaning = "training steps between checkpoints, and between measurements on --valid; default: a tenth of all steps"
    parser.add_argument("--every", type=positive, help=meaning)
    meaning = "stop after this many measurements in a row without a better nDCG@10; default: never stop early"
    parser.add_argument("--patience", type=positive, help=meaning)
    parser.add_argument("--seed", type=int, default=42, help="random seed of the training (default %(default)s)")
    meaning = "folder for the checkpoints of the training, from which an interrupted training resumes"
    parser.add_argument("--state", type=Path, help=meaning)


def learner(student: Reranker, arguments: argparse.Namespace) -> Any:
    """The estimator that trains `student` as the options describe: a `Distil` or a `FineTune` of
    `pyterrier_lit.training`."""
    from pyterrier_lit.training import Distil, FineTune

    settings = {name: getattr(arguments, name) for name in ("recipe", "every", "patience", "seed")}
    settings |= {"folder": arguments.state, **dict(arguments.set)}
    if arguments.teacher is not None or arguments.order:
        return Distil(student, arguments.teacher, **settings)
    return FineTune(student, **settings)


def check_training(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise those errors of training that can be detected without loading the model or reading the data."""
    plan = learner(reranker(parser, arguments), arguments)
    plan.chosen_recipe()
    plan.chosen_settings()
    for path in (arguments.labels, arguments.teacher, arguments.valid, arguments.valid_labels):
        if path is not None:
            path.stat()
    standing = next(path for path in (arguments.output, *arguments.output.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise OSError(f"{arguments.output} cannot be written to; give another output")


def reranker(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Reranker:
    """The reranker that the options describe. Its checkpoint is not loaded yet.

    If an option does not belong to this reranker, the program ends with a message. Raises ValueError if the value of an
    option is invalid.
    """
    given = {name: getattr(arguments, name) for name in constructor_options() if hasattr(arguments, name)}
    for name in given:
        owners = constructor_options()[name]
        if arguments.reranker not in owners:
            parser.error(f"{flag(name)} is an option of {' and '.join(owners)}, not of {arguments.reranker}")
    if arguments.model is not None:
        given["model"] = arguments.model
    named = RERANKERS[arguments.reranker](**given)
    check_values(named)
    return named


def student(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Reranker:
    """The reranker to train. With --backbone, this is an untrained reranker from the pre-trained model that --backbone
    names. Without --backbone, this is the result of `reranker`."""
    kind, named = RERANKERS[arguments.reranker], reranker(parser, arguments)
    if arguments.backbone is None:
        return named
    given = {name: getattr(named, name) for name in constructor_options() if hasattr(arguments, name)}
    given |= {name: getattr(arguments, name) for name in kind.begin_options() if hasattr(arguments, name)}
    import torch

    torch.manual_seed(arguments.seed)  # training that is resumed must start from the same weights
    return kind.from_backbone(arguments.backbone, **given)


def run_settings(arguments: argparse.Namespace, named: Reranker) -> dict[str, Any]:
    """The keyword arguments of `write_run` that the options set, as name -> value."""
    by_itself = f"{arguments.reranker}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(named.model).resolve().name)}"
    return {
        "system": arguments.system or by_itself,
        "chunk": arguments.chunk or chunk_for(named),
        "resume": arguments.resume,
        "weights": partial(fingerprint, named),
    }


def constructor_options() -> Parameters:
    """The constructor arguments that are command line options: argument name -> name of each reranker with this
    argument -> parameter."""
    found: Parameters = {}
    for name, kind in RERANKERS.items():
        for parameter in inspect.signature(kind).parameters.values():
            if parameter.name not in SET_HERE and value_types(parameter):
                found.setdefault(parameter.name, {})[name] = parameter
    return found


def setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE into (name, value): "steps=1000" -> ("steps", 1000). A VALUE that is not a Python literal stays
    a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def value_types(parameter: inspect.Parameter) -> list[type]:
    """Those of the types int, float and str that a parameter accepts, in this order: [int] for `int | None`, [] for
    `bool`."""
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    return [kind for kind in (int, float, str) if kind in kinds]


def flag(name: str) -> str:
    """The command line option for an argument: "top_k" -> "--top-k"."""
    return f"--{name.replace('_', '-')}"


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def program() -> str:
    """The name under which this program was called: "pyterrier-lit" or "python -m pyterrier_lit"."""
    script = Path(sys.argv[0]).stem
    return script if script == "pyterrier-lit" else "python -m pyterrier_lit"


def main(words: list[str] | None = None) -> int:
    """Run one command. Returns the exit code, which is 0 if there was no error. An error is printed to stderr as one
    line.

    words: the words of the command line after the name of the program; None takes the words with which this process was
    started.
    """
    words = sys.argv[1:] if words is None else words
    asked = re.search(r"--reranker[ =](\S+)", " ".join(words))
    named = asked[1] if asked and asked[1] in RERANKERS else None
    parser = argparse.ArgumentParser(prog=program(), description="Neural rerankers for files of candidates.")
    parser.add_argument("--version", action="version", version=f"pyterrier_lit {pyterrier_lit.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__, allow_abbrev=False
        )
        own.set_defaults(run=command(own, named))
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as error:
        return failed(parser, "interrupted", error, code=130)
    except (OSError, ValueError, TypeError, MemoryError, ImportError) as error:
        return failed(parser, str(error) or type(error).__name__, error, code=1)
    return 0


def failed(parser: argparse.ArgumentParser, what: str, error: BaseException, code: int) -> int:
    """Print one line with the error and its notes, such as a note on the finished part of a run. Returns `code`.

    what: the message of the error. code: the exit code.
    """
    told = " ".join("; ".join([what, *getattr(error, "__notes__", ())]).split())
    print(f"{parser.prog}: {told.replace('resume continues', '--resume continues')}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
