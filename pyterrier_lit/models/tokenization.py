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
# BERT's settings for characters: the name in tokenizer_config.json -> the name in tokenizer.json
BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def check_pieces(known: int, size: int, source: str, model: str = "model") -> None:
    """Raise ValueError if a tokenizer has more tokens than the model has embeddings.

    Args:
        known: the highest id in the tokenizer, plus 1.
        size: the number of embeddings of the model.
        source: the name of the checkpoint, for the error message.
        model: the word for the model in the error message.
    """
    if known > size:
        raise ValueError(
            f"{source}: the tokenizer has {known} tokens and the {model} {size}; they are from different checkpoints"
        )


def pieces_known(tokenizer: tokenizers.Tokenizer) -> int:
    """Return the highest token id of a tokenizer, plus 1. The ids of the special tokens that the tokenizer puts around
    a text are included."""
    around = [*tokenizer.encode("").ids, *tokenizer.encode("", "").ids]
    return max([*tokenizer.get_vocab().values(), *around], default=-1) + 1


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic, a crash in the Rust code of the `tokenizers` package. A panic is a
    BaseException but not an Exception, so `except Exception` does not catch it."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def no_panic(source: str) -> Iterator[None]:
    """Return a context manager that turns a panic of the `tokenizers` package into a ValueError. `source` states what
    was tokenised, for the error message."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer cannot read {source}: it failed ({first_line(error)})") from error


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
    """Yield the token ids of each text. The texts are tokenised in chunks, since the result of the `tokenizers` package
    takes about 10 kB of memory per text.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        special_tokens: whether to put the tokenizer's special tokens around each text.

    Raises ValueError if the tokenizer fails for a text. The message quotes the start of this text.
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
    """Let BERT's settings for characters in tokenizer_config.json override those in tokenizer.json, as in transformers.
    These settings are lower-casing, stripping accents, and splitting Chinese characters.

    Args:
        tokenizer: the tokenizer, which is changed in place.
        settings: the fields of tokenizer_config.json.
    """
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        for setting in settings.keys() & BERT.keys():
            setattr(normalizer, BERT[setting], settings[setting])
        tokenizer.normalizer = normalizer


def bare_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> tokenizers.Tokenizer:
    """Return the object of the `tokenizers` package behind a tokenizer of transformers. Truncation and padding are
    disabled in place."""
    bare: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    bare.no_truncation()
    bare.no_padding()
    return bare


def chats_about_pairs(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether a tokenizer's chat template has placeholders for a query and a document. sentence-transformers
    would use such a template to build the model's input for each query-passage pair."""

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
