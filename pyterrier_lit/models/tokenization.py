"""Fast tokenizers: texts -> token ids, with errors that name the text; and tokenizer settings of checkpoints."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from pyterrier_lit.models.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 1_000  # texts that are tokenised in one call
CHAT_TEMPLATE = "chat_template"  # the field of a tokenizer_config.json
# BERT's settings for characters: their names in tokenizer_config.json -> their names in tokenizer.json
BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def check_pieces(known: int, size: int, source: str, model: str = "model") -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has embeddings.

    known: the highest id in the tokenizer, plus 1. size: the number of embeddings.
    """
    if known > size:
        raise ValueError(
            f"{source}: the tokenizer has {known} tokens and the {model} {size}; they are from different checkpoints"
        )


def pieces_known(tokenizer: tokenizers.Tokenizer) -> int:
    """The highest id of a tokenizer, plus 1, among its vocabulary and the special tokens that it puts around a text."""
    around = [*tokenizer.encode("").ids, *tokenizer.encode("", "").ids]
    return max([*tokenizer.get_vocab().values(), *around], default=-1) + 1


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the library tokenizers. A panic is a BaseException but not an Exception, so
    `except Exception` does not catch it."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def no_panic(source: str) -> Iterator[None]:
    """A context that turns a tokenizer's panic into a ValueError. source: what was tokenised, for the error message."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer cannot read {source}: it failed ({first_line(error)})") from error


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
    """The token ids of each text. The texts are tokenised in chunks, since the tokenizer's result takes about 10 kB of
    memory per text.

    Raises ValueError, with the text, if the tokenizer fails at a text.
    """
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        try:
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=special_tokens)
        except BaseException as error:
            if not is_panic(error):
                raise
            encodings = [_encode_alone(tokenizer, text, special_tokens) for text in chunk]
        yield from (encoding.ids for encoding in encodings)


def _encode_alone(tokenizer: tokenizers.Tokenizer, text: str, special_tokens: bool) -> tokenizers.Encoding:
    with no_panic(f"the text {text[:60] + '...' if len(text) > 60 else text!r}"):
        return tokenizer.encode(text, add_special_tokens=special_tokens)


def settle(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Give the settings of tokenizer_config.json precedence over BERT's settings in tokenizer.json, as transformers
    does."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        for setting in settings.keys() & BERT.keys():
            setattr(normalizer, BERT[setting], settings[setting])
        tokenizer.normalizer = normalizer


def bare_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> tokenizers.Tokenizer:
    """The `tokenizers` object behind a tokenizer of transformers, without truncation or padding."""
    bare: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    bare.no_truncation()
    bare.no_padding()
    return bare


def chats_about_pairs(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether a tokenizer's chat template has placeholders for a query and a document. With such a template,
    sentence-transformers builds the inputs for query-passage pairs."""

    def written(query: Any, document: Any) -> str:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    for content in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            plain, *others = (written(content(query), content(text)) for query, text in ("ab", "cb", "ac"))
        except Exception:  # a template may raise any error, for example for an unknown role
            continue
        if plain not in others:
            return True
    return False
