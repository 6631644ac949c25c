"""Fast tokenizers: texts -> ids, with errors that name the text; settings that a checkpoint keeps beside them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from pyterrier_lit.models.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 1_000  # texts
CHAT_TEMPLATE = "chat_template"  # the field of a tokenizer_config.json
# How BERT reads letters: by its names in tokenizer_config.json, and in tokenizer.json
BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def check_pieces(known: int, size: int, source: str, model: str = "model") -> None:
    """ValueError for a tokenizer that knows more pieces than the model has embeddings. known: its highest id + 1."""
    if known > size:
        raise ValueError(
            f"{source}: the tokenizer knows {known} pieces and the {model} {size}; they are of two checkpoints"
        )


def pieces_known(tokenizer: tokenizers.Tokenizer) -> int:
    """The highest id that a tokenizer can write, + 1: of its pieces, and of the tokens that it puts around texts."""
    around = [*tokenizer.encode("").ids, *tokenizer.encode("", "").ids]
    return max([*tokenizer.get_vocab().values(), *around], default=-1) + 1


def is_panic(error: BaseException) -> bool:
    """Whether a tokenizer panicked. That is no Exception: it would pass whatever handles errors."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def no_panic(source: str) -> Iterator[None]:
    """A tokenizer's panic in the block becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer cannot read {source}: it failed ({first_line(error)})") from error


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
    """The ids of each text. The tokenizer is given CHUNK texts at a time: its results are some 10 kB each.

    ValueError names a text at which the tokenizer fails.
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
    """Let the settings of a tokenizer_config.json win over BERT's in a tokenizer.json, as transformers does."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        for setting in settings.keys() & BERT.keys():
            setattr(normalizer, BERT[setting], settings[setting])
        tokenizer.normalizer = normalizer


def bare_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> tokenizers.Tokenizer:
    """What stands behind a tokenizer of the library, without truncation or padding."""
    bare: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    bare.no_truncation()
    bare.no_padding()
    return bare


def chats_about_pairs(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether its chat template has places for a query and a document, by which sentence-transformers writes pairs."""

    def written(query: Any, document: Any) -> str:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    for content in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            plain, *others = (written(content(query), content(text)) for query, text in ("ab", "cb", "ac"))
        except Exception:  # a template may raise anything, and often does for a role that it does not know
            continue
        if plain not in others:
            return True
    return False
