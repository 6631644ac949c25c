"""Model cards, and uploads of a checkpoint's folder to the hub. This module does not deal with networks.

In this module, `save` is the method of a reranker that writes its checkpoint and a model card into a folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyterrier_lit.models.checkpoints import FILES, HUB_ID
from pyterrier_lit.models.errors import first_line

CARD = "README.md"
KEPT = ("license", "language")  # a new card keeps the older card's header fields that start with these words
# A card without this line counts as written by a user
MARK = (
    "<!-- Written by `save` of pyterrier_lit, which replaces it when it saves here again, unless this line is gone."
    " Give your license above, as `license: ...` -->"
)
ELSEWHERE = """
## In other libraries

It is a sequence classifier of transformers with one score. sentence-transformers reads it as it is:

```python
from sentence_transformers import CrossEncoder as SentenceCrossEncoder

SentenceCrossEncoder("NAME").rank("a query", ["a passage", "another"])
```

Text Embeddings Inference serves it under `/rerank`.
"""


def card(
    name: str,
    kind: str,
    about: str,
    base_model: str | None,
    facts: Mapping[str, object],
    trainings: Sequence[Mapping[str, str]] = (),
    *,
    earlier: str = "",
    classifier: bool = False,
    arguments: str = "",
) -> str:
    """Return the text of a checkpoint's model card.

    Args:
        name: the name of the checkpoint's folder.
        kind: the name of the reranker's class in this package.
        about: a sentence about the reranker's class.
        base_model: the hub id of the base model, or None.
        facts: the settings to record, as name -> value.
        trainings: for each new training run, facts about the run as name -> text.
        earlier: the training section of an older card, or "". This section is put before the new training runs.
        classifier: whether transformers can load the checkpoint as a sequence classifier.
        arguments: further arguments of the constructor in the card's example, such as ', device="cpu"'.
    """
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        library_name=_library(classifier),
        pipeline_tag="text-ranking",
        base_model=base_model,
        tags=["pyterrier", "reranking", kind.lower()],
    )
    parts = [f"---\n{head.to_yaml()}\n---\n\n{MARK}\n\n# {name}\n\nA `{kind}` of pyterrier_lit. {about}\n"]
    parts += [_listed(facts)]
    told = [earlier] * bool(earlier) + [_listed(each) for each in trainings]
    parts += ["## Training\n\n" + "\nAnd then\n\n".join(told)] * bool(told)
    parts += [
        f"""## Use

```python
from pyterrier_lit import {kind}

pipeline = first_stage % 100 >> {kind}("{name}"{arguments})  # after any first stage of PyTerrier
```
"""
    ]
    text = "\n".join(parts)
    return text + ELSEWHERE.replace("NAME", name) if classifier else text


def again(text: str, old: str, new: str, *, classifier: bool = False) -> str:
    """Return the text of a card with a new name for its checkpoint. A card that `save` did not write is returned
    unchanged.

    Args:
        text: the text of the card.
        old: the checkpoint's name in `text`.
        new: the new name of the checkpoint.
        classifier: whether transformers can load the renamed checkpoint as a sequence classifier. If so, the new card
            shows how other libraries load the checkpoint.
    """
    from huggingface_hub import ModelCard

    if MARK in text:
        text = text.replace(f"# {old}\n", f"# {new}\n").replace(json.dumps(old), json.dumps(new))
        if classifier and ELSEWHERE.splitlines()[1] not in text:
            held = ModelCard(text, ignore_metadata_errors=True)
            held.data["library_name"] = _library(classifier)
            text = str(held) + ELSEWHERE.replace("NAME", new)
    return text


def in_place_of(text: str, before: str) -> str | None:
    """Return the text of a new card, with the license and language of the older card that it replaces. Returns None if
    `save` did not write the older card, since a card that a user wrote must not be replaced.

    Args:
        text: the text of the new card.
        before: the text of the older card.
    """
    from huggingface_hub import ModelCard

    if MARK not in before:
        return None
    held, new = ModelCard(before, ignore_metadata_errors=True), ModelCard(text, ignore_metadata_errors=True)
    kept = {name: value for name, value in vars(held.data).items() if name.startswith(KEPT)}
    for name in kept:
        new.data[name] = kept[name]
    return str(new) if kept else text


def read_card(folder: Path) -> str | None:
    """Return the text of the card in a folder, or None if there is no card."""
    file = folder / CARD
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def base_of(text: str) -> str | None:
    """Return the base model that a card names, or None if the card names no base model. `text` is the text of the
    card."""
    from huggingface_hub import ModelCard

    named = ModelCard(text, ignore_metadata_errors=True).data.get("base_model")
    return named if isinstance(named, str) else None


def trainings_of(text: str) -> str:
    """Return the section on training runs in a card that `save` wrote, without the heading of the section. Returns ""
    if there is no such section, or if `save` did not write the card. `text` is the text of the card."""
    told = text.partition("\n## Training\n")[2].partition("\n## Use\n")[0].strip()
    return f"{told}\n" if told and MARK in text else ""


def is_hub_id(model: object) -> bool:
    """Return whether `model` has the form of a hub id and is not the path of a local file or folder."""
    return bool(HUB_ID.fullmatch(str(model))) and not Path(str(model)).exists()


def push(
    folder: Path, repo_id: str, *, private: bool | None, revision: str | None, message: str, token: str | None
) -> str:
    """Upload the files of a checkpoint's folder to a repository on the hub, and return the id of the commit. If the
    repository has a model card that `save` did not write, this card is kept. Files in the repository that do not belong
    to a checkpoint are kept, too.

    Args:
        folder: the checkpoint's folder.
        repo_id: owner/name of the repository, which is created if necessary.
        private: whether a new repository is private. None takes the default of the user's account.
        revision: the branch, which is created if necessary. None is main.
        message: the message of the commit.
        token: an access token of the hub. None uses the environment variable HF_TOKEN or the token of `hf auth login`.

    Raises OSError, with the message of the hub's client, if the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            there = read_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)).parent)
        except EntryNotFoundError:
            there = None
        text = read_card(folder)
        if there is not None and text is not None and (kept := in_place_of(text, there)):
            (folder / CARD).write_text(kept, encoding="utf-8")
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[CARD] if there is not None and MARK not in there else None,
            delete_patterns=list(FILES),
        )
    except Exception as error:  # the hub's client raises errors of its own, of httpx and of the system
        raise OSError(
            f"{repo_id!r} could not be pushed to the hub ({type(error).__name__}: {first_line(error)}). Log in with"
            " `hf auth login` or HF_TOKEN, by a token with write access; `save` writes the same files into a folder"
        ) from error
    return str(done.oid)


def _library(classifier: bool) -> str:
    return "sentence-transformers" if classifier else "pyterrier-lit"


def _listed(facts: Mapping[str, object]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in facts.items() if value is not None)
