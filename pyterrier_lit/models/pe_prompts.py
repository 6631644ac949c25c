"""PE-Rank's prompts: a query and its passages in a checkpoint's chat template, tokenised. This module does not deal
with models.

A prompt represents each passage in one of three ways: by a placeholder for its vector, by a placeholder and its text,
or (in the baseline of the paper) by its text only.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.errors import first_line
from pyterrier_lit.models.tokenization import check_pieces, no_panic

PLACEHOLDER, RANK = "<PLACEHOLDER>", "<RANK>"  # tokens for a passage's vector, and for a rank in training prompts

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
    """The base class of all prompters. A prompter has a tokenizer with a chat template. Its prompts are a single user
    turn with cleaned texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    @property
    def n_ids(self) -> int:
        """The highest id in the tokenizer, plus 1."""
        return 1 + int(max(self.tokenizer.get_vocab().values()))

    def render(self, query: str, texts: Sequence[Any]) -> str:
        """The prompt for a query and its passages in the chat template, as text."""
        return str(
            self.tokenizer.apply_chat_template(self.messages(query, texts), tokenize=False, add_generation_prompt=True)
        )

    def messages(self, query: str, texts: Sequence[Any]) -> list[dict[str, str]]:
        """The prompt for a query and its passages, as one user turn."""
        raise NotImplementedError

    def tokenized(self, queries: Sequence[str], texts: Sequence[Sequence[Any]]) -> list[list[int]]:
        """The token ids of the prompt for each query and its passages."""
        rendered = [self.render(query, shown) for query, shown in zip(queries, texts, strict=True)]
        with no_panic(f"a prompt, such as that for query {queries[:1]}"):
            prompts: list[list[int]] = (
                self.tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
            )
        return prompts

    def answered(self, messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
        """For training: the token ids of a prompt with its answer, and the position of the answer's first token."""
        turns = [*messages, {"role": "assistant", "content": answer}]
        asked, whole = (
            self.tokenizer(self.tokenizer.apply_chat_template(shown, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
            for shown in (messages, turns)
        )
        return whole, len(asked)

    def _cleaned(self, text: str) -> str:
        """A passage, cleaned as in the code of PE-Rank's authors: white space around it is removed, and [12] becomes
        (12), since [12] could be mistaken for an identifier."""
        return re.sub(r"\[(\d+)\]", r"(\1)", self._neutral(text.strip()))

    def _neutral(self, text: str) -> str:
        """The text with a space inside each special token of the tokenizer: `< PLACEHOLDER>` for `<PLACEHOLDER>`."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


class Prompter(ChatPrompter):
    """Builds prompts with placeholders for vectors. The tokenizer must have the token <PLACEHOLDER>."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        special = tokenizer.get_added_vocab()
        self.placeholder = special[PLACEHOLDER]
        self.rank = special.get(RANK)

    def ids(self, queries: Sequence[str], texts: Sequence[Sequence[str]], counts: Sequence[int]) -> list[list[int]]:
        """The token ids of the prompt for each query and its n passages.

        texts: for each query the texts of its n passages, or an empty list for a prompt without texts. counts: n for
        each query. Raises ValueError if a prompt does not have exactly one placeholder per passage.
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
        """The prompt for n passages, as one user turn. Each passage is a placeholder, followed by the passage's text
        unless the text is None."""
        passages = "".join(
            f"Passage {i}: [{PLACEHOLDER}]{'' if text is None else ' ' + self._cleaned(text)}\n\n"
            for i, text in enumerate(texts, 1)
        )
        content = PROMPT.format(n=len(texts), query=self._neutral(query), passages=passages)
        return [{"role": "user", "content": content}]

    def alignment(self, text: str) -> tuple[list[dict[str, str]], str]:
        """For alignment (training stage 1): a prompt with a passage's placeholder, and the passage's text as the
        answer. The wording of the prompt is not the paper's."""
        content = f"Given the passage: {PLACEHOLDER}, reconstruct the original text."
        return [{"role": "user", "content": content}], self._neutral(text.strip())


class TextPrompter(ChatPrompter):
    """Builds prompts with texts only, and the answers to these prompts: "[4] > [2] > ..."."""

    def messages(self, query: str, texts: Sequence[str]) -> list[dict[str, str]]:
        """The prompt for n passages, as one user turn."""
        passages = "".join(f"Passage {i}: {self._cleaned(text)}\n\n" for i, text in enumerate(texts, 1))
        content = TEXT_PROMPT.format(n=len(texts), query=self._neutral(query), passages=passages)
        return [{"role": "user", "content": content}]

    @staticmethod
    def answer(order: Sequence[int]) -> str:
        """The target ranking string for the positions of some passages, best first."""
        return " > ".join(f"[{position + 1}]" for position in order)

    def identifiers(self, n: int) -> tuple[list[int], list[list[int]]]:
        """The token ids of the start of an answer, "[". Also, for each of n identifiers, its token ids up to the start
        of the next identifier: those of "1] > [", "2] > [", ...

        Raises ValueError if the tokenizer splits an answer into other tokens than these.
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
    """The prompter with the tokenizer and the chat template of a folder. Raises ValueError if these do not belong to a
    PE-Rank model.

    vocab_size: the number of embeddings of the model. add: whether to add the two special tokens of PE-Rank to the
    tokenizer.
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
    """Like `read_prompter`, for prompts with texts only. The model may be any model with a chat template."""
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
    """The transformers tokenizer, from tokenizer.json if that file exists.

    AutoTokenizer of transformers 5 would rebuild the tokenizer with the class that tokenizer_config.json names, or, for
    Mistral, with another class. The rebuilt tokenizer would give other token ids.
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
    except Exception as error:  # the library tokenizers raises bare Exception
        raise ValueError(f"{folder} has no tokenizer that can be read ({first_line(error)})") from error


def _check_sentencepieces(file: Path) -> None:
    """Raise RuntimeError for a truncated file. From such a file, transformers would build an empty vocabulary."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        raise RuntimeError(f"{file.name} is cut short or damaged: {error}") from error
