"""PE-Rank's prompts: a query and its passages in a checkpoint's chat template, tokenised. This module does not deal
with models.

A prompt represents each passage by a placeholder for the passage's vector, by the passage's text, or by both. Prompts
with texts only are used by RankMistral, a baseline in the PE-Rank paper (arXiv 2406.14848).
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.errors import first_line
from pyterrier_lit.models.tokenization import check_pieces, no_panic

# In a prompt, PLACEHOLDER stands for the vector of a passage. In the answer of a training example, RANK stands for the
# vector of a passage. The answer has one RANK per passage, best passage first
PLACEHOLDER, RANK = "<PLACEHOLDER>", "<RANK>"

PROMPT = (
    "I will provide you with {n} passages, each with a special token representing the passage enclosed in [], followed"
    " by original text.\n"
    "Rank the passages based on their relevance to the search query: {query}.\n"
    "{passages}"
    "Search Query: {query}.\n"
    "Rank the {n} relatively ordered passages above based on their relevance to the search query, output the ranking in"
    " descending order. Only output the {n} unique special token in the ranking.\n\n"
)
TEXT_PROMPT = (
    "I will provide you with {n} passages.\n"
    "Rank the passages based on their relevance to the search query: {query}.\n"
    "{passages}"
    "Search Query: {query}.\n"
    "Rank the {n} relatively ordered passages above based on their relevance to the search query, output the ranking in"
    " descending order. The output format should be [] > [] > ..., e.g., [4] > [2] > ..., Only respond with the ranking"
    " results with {n} unique numbers, do not say anything else or explain.\n\n"
)


class ChatPrompter:
    """The base class of all prompters. A prompter builds prompts with a tokenizer and its chat template.

    Each prompt is a single user turn. If the query or a passage contains a special token such as `</s>`, the prompter
    puts a space into this token: `< /s>`. The tokenizer reads `< /s>` as plain text. In the texts of the passages,
    `[12]` becomes `(12)`.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    @property
    def n_ids(self) -> int:
        """The highest token id of the tokenizer, plus 1."""
        return 1 + int(max(self.tokenizer.get_vocab().values()))

    def render(self, query: str, texts: Sequence[Any]) -> str:
        """Return the prompt for a query and its passages as text, formatted by the chat template.

        Args:
            query: the query.
            texts: for each passage, its text. `Prompter` also takes None, for a passage without its text in the prompt.
        """
        return str(
            self.tokenizer.apply_chat_template(self.messages(query, texts), tokenize=False, add_generation_prompt=True)
        )

    def messages(self, query: str, texts: Sequence[Any]) -> list[dict[str, str]]:
        """Return the prompt for a query and its passages as one user turn, in the form that a chat template takes.

        Args:
            query: the query.
            texts: an item for each passage, as in `render`.
        """
        raise NotImplementedError

    def tokenized(self, queries: Sequence[str], texts: Sequence[Sequence[Any]]) -> list[list[int]]:
        """Return the token ids of the prompt for each query and its passages.

        Args:
            queries: the queries.
            texts: for each query and each of its passages, an item as in `render`.

        Raises ValueError if the tokenizer fails.
        """
        rendered = [self.render(query, shown) for query, shown in zip(queries, texts, strict=True)]
        with no_panic(f"a prompt, such as that for query {queries[:1]}"):
            prompts: list[list[int]] = (
                self.tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
            )
        return prompts

    def answered(self, messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
        """Tokenise a prompt with its answer, for training.

        Args:
            messages: the prompt, as `messages` returns it.
            answer: the answer, as text.

        Returns the token ids of prompt and answer together, and the number of tokens of the prompt. A header that the
        chat template puts before the answer, such as "assistant", counts as a part of the answer.
        """
        turns = [*messages, {"role": "assistant", "content": answer}]
        asked, whole = (
            self.tokenizer(self.tokenizer.apply_chat_template(shown, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
            for shown in (messages, turns)
        )
        return whole, len(asked)

    def _cleaned(self, text: str) -> str:
        """Return a passage's text for a prompt. As in the code of PE-Rank's authors, white space around the text is
        removed, and [12] becomes (12), since [12] could be mistaken for an identifier. Unlike in their code, each
        special token gets a space (`_neutral`)."""
        return re.sub(r"\[(\d+)\]", r"(\1)", self._neutral(text.strip()))

    def _neutral(self, text: str) -> str:
        """Return the text with a space inside each special token of the tokenizer: `< PLACEHOLDER>` for
        `<PLACEHOLDER>`."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


class Prompter(ChatPrompter):
    """Builds prompts with placeholders for vectors.

    Args:
        tokenizer: a tokenizer of transformers with a chat template and the token <PLACEHOLDER>.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        special = tokenizer.get_added_vocab()
        self.placeholder = special[PLACEHOLDER]
        self.rank = special.get(RANK)

    def ids(self, queries: Sequence[str], texts: Sequence[Sequence[str]], counts: Sequence[int]) -> list[list[int]]:
        """Return the token ids of the prompt for each query and its n passages.

        Args:
            queries: the queries.
            texts: for each query, the texts of its n passages, or an empty list for a prompt without texts.
            counts: for each query, the number n of its passages.

        Raises ValueError if a prompt does not have exactly one placeholder per passage.
        """
        prompts = self.tokenized(queries, [shown or [None] * n for shown, n in zip(texts, counts, strict=True)])
        for ids, query, n in zip(prompts, queries, counts, strict=True):
            if ids.count(self.placeholder) != n:
                raise ValueError(
                    f"the prompt for query {query!r} has {ids.count(self.placeholder)} placeholders for {n} passages;"
                    " check the chat template"
                )
        return prompts

    def messages(self, query: str, texts: Sequence[str | None]) -> list[dict[str, str]]:
        """Return the prompt for a query and its n passages as one user turn. Each passage is represented by a
        placeholder. If the passage's text is not None, the text follows the placeholder.

        Args:
            query: the query.
            texts: for each passage, its text or None.
        """
        passages = "".join(
            f"Passage {i}: [{PLACEHOLDER}]{'' if text is None else ' ' + self._cleaned(text)}\n\n"
            for i, text in enumerate(texts, 1)
        )
        content = PROMPT.format(n=len(texts), query=self._neutral(query), passages=passages)
        return [{"role": "user", "content": content}]

    def alignment(self, text: str) -> tuple[list[dict[str, str]], str]:
        """Return a prompt and its answer for alignment, the first training stage of PE-Rank. The prompt contains a
        placeholder for one passage. The answer is the text of this passage. The prompt in the paper is worded
        differently."""
        content = f"Given the passage: {PLACEHOLDER}, reconstruct the original text."
        return [{"role": "user", "content": content}], self._neutral(text.strip())


class TextPrompter(ChatPrompter):
    """Builds prompts with texts only, and the answers to these prompts, such as "[4] > [2] > [1] > [3]"."""

    def messages(self, query: str, texts: Sequence[str]) -> list[dict[str, str]]:
        """Return the prompt for a query and its n passages as one user turn.

        Args:
            query: the query.
            texts: the texts of the n passages.
        """
        passages = "".join(f"Passage {i}: {self._cleaned(text)}\n\n" for i, text in enumerate(texts, 1))
        content = TEXT_PROMPT.format(n=len(texts), query=self._neutral(query), passages=passages)
        return [{"role": "user", "content": content}]

    @staticmethod
    def answer(order: Sequence[int]) -> str:
        """Return the answer that ranks the passages of a prompt in a given order. `order` has the positions of the
        passages in the prompt (from 0), best first. For [3, 1, 0, 2], the answer is "[4] > [2] > [1] > [3]"."""
        return " > ".join(f"[{position + 1}]" for position in order)

    def identifiers(self, n: int) -> tuple[list[int], list[list[int]]]:
        """Return the token ids of the parts of an answer for n passages. An answer, such as "[2] > [1]", starts with
        "[". Then follow parts such as "2] > [": an identifier's number, up to the "[" of the next identifier. The
        function returns the token ids of the first "[", and a list with the token ids of each of the parts "1] > [",
        "2] > [", ..., "n] > [".

        Raises ValueError if the tokens of a whole answer are not the tokens of these parts.
        """
        numbers = range(1, n + 1)
        with no_panic("identifiers"):
            ones = self._plain([f"[{i}]" for i in numbers])
            twos = self._plain([f"[{i}] > [{i}]" for i in numbers])
            (written,) = self._plain([self.answer(range(n))])
        words = [two[1 : 1 + len(two) - len(one)] for one, two in zip(ones, twos, strict=True)]
        (asked,) = self.tokenized(["a query"], [["a passage"]])
        whole, _ = self.answered(self.messages("a query", ["a passage"]), self.answer([0]))
        opened = whole[len(asked) :]
        begins_so = whole[: len(asked)] == asked and words[0][0] in opened
        if not begins_so or [*written[:1], *chain(*words)][: len(written)] != written:
            raise ValueError(
                "the tokenizer splits an identifier, such as [12] in '[12] > [4]', differently depending on its"
                " position: decoding='constrained' cannot be used with it; decoding='free' can"
            )
        return opened[: opened.index(words[0][0])], words

    def _plain(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def read_prompter(folder: Folder, vocab_size: int, *, add: bool = False) -> Prompter:
    """Return the prompter with the tokenizer and the chat template of a folder.

    Args:
        folder: the folder of the checkpoint.
        vocab_size: the number of embeddings of the model. It is ignored if `add` is true.
        add: whether to add the special tokens PLACEHOLDER and RANK to the tokenizer.

    Raises ValueError if there is no usable chat template, if the tokenizer has no token PLACEHOLDER, or if the
    tokenizer has more tokens than the model has embeddings.
    """
    tokenizer = _read_tokenizer(folder)
    if add:
        tokenizer.add_tokens([PLACEHOLDER, RANK], special_tokens=True)
    _check_template(folder, tokenizer)
    if PLACEHOLDER not in tokenizer.get_added_vocab():
        raise ValueError(f"the tokenizer of {folder} is not that of a PE-Rank model: it has no {PLACEHOLDER}")
    prompter = Prompter(tokenizer)
    if not add:
        check_pieces(prompter.n_ids, vocab_size, str(folder))
    _try(folder, lambda: prompter.render("a query", [None]))
    return prompter


def read_text_prompter(folder: Folder, vocab_size: int) -> TextPrompter:
    """Return the prompter for prompts with texts only, with the tokenizer and the chat template of a folder. The folder
    may be that of any language model with a chat template.

    Args:
        folder: the folder of the checkpoint.
        vocab_size: the number of embeddings of the model.

    Raises ValueError if there is no usable chat template, or if the tokenizer does not match the model.
    """
    tokenizer = _read_tokenizer(folder)
    _check_template(folder, tokenizer)
    prompter = TextPrompter(tokenizer)
    check_pieces(prompter.n_ids, vocab_size, str(folder))
    _try(folder, lambda: prompter.render("a query", ["a passage"]))
    return prompter


def _check_template(folder: Folder, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template; wanted that of an instruction-tuned model, in"
            " tokenizer_config.json or chat_template.jinja"
        )


def _try(folder: Folder, render: Callable[[], str]) -> None:
    try:
        render()
    except Exception as error:  # an error of Jinja, or one that the template raises
        raise ValueError(
            f"the chat template of {folder} cannot be used ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _read_tokenizer(folder: Folder) -> Any:
    """Return the tokenizer of a folder as an object of transformers. If there is a tokenizer.json, this file is read.

    In transformers 5, AutoTokenizer would not read tokenizer.json as it is. It would build a new tokenizer of the class
    that tokenizer_config.json names or, for Mistral, of another class. This new tokenizer would give other token ids.
    """
    import transformers

    folder.check_vocabulary()
    known: Any = transformers.PreTrainedTokenizerFast
    is_fast = (folder.path / "tokenizer.json").exists()
    if not is_fast:
        name = str(folder.tokenizer_config.get("tokenizer_class")).removesuffix("Fast")
        named = getattr(transformers, name, None)
        is_tokenizer = isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)
        known = named if is_tokenizer else transformers.AutoTokenizer
    try:
        if not is_fast and (folder.path / "tokenizer.model").exists():
            _check_sentencepieces(folder.path / "tokenizer.model")
        with no_panic("any text"):
            return known.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder} has no tokenizer that can be read ({first_line(error)})") from error


def _check_sentencepieces(file: Path) -> None:
    """Raise RuntimeError if a SentencePiece file is truncated. From a truncated file, transformers would build an empty
    vocabulary."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        raise RuntimeError(f"{file.name} is cut short or damaged: {error}") from error
