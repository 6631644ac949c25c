"""T5's tokenizer: texts -> token ids and back. It is read from spiece.model, or from a tokenizer.json that was made
from a spiece.model."""

import base64
import json
import struct
from itertools import groupby
from typing import Any

from pyterrier_lit.models.checkpoints import Folder
from pyterrier_lit.models.errors import damaged

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # SentencePiece's numbers for types of tokens


class SentencePieces:
    """T5's tokenizer. Texts are split as in the slow tokenizer of transformers with `legacy=False`. Control tokens in a
    text, such as </s>, are read as plain characters.

    Args:
        model: the bytes of a spiece.model.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        # A protobuf message that is merged into the model. It sets add_dummy_prefix (field 3 of normalizer_spec) to
        # false. normalizer_spec is field 3 of the model and has two bytes here
        no_dummy_prefix = b"\x1a\x02\x18\x00"
        self.model = model  # the bytes that `T5Checkpoint.save` writes
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(self.model + no_dummy_prefix)
        self._guard = len(self.processor.encode("<unk>"))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without </s>. SentencePiece alone would remove a leading space. An <unk>
        before each text prevents this. The token ids of the <unk> are removed from the result."""
        guarded = ["<unk>\u2581" + text.replace(" ", "\u2581") for text in texts]
        return [ids[self._guard :] for ids in self.processor.encode(guarded)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of a list of token ids. Ids that the tokenizer does not have, such as that of <extra_id_0>,
        are left out. The texts before and after such ids are joined by a space."""
        known = [list(group) for known, group in groupby(ids, lambda id: id < self.processor.get_piece_size()) if known]
        return " ".join(self.processor.decode(group) for group in known)


def read_pieces(folder: Folder) -> SentencePieces:
    """Return T5's tokenizer from a folder. It is read from spiece.model or, if there is no such file, from
    tokenizer.json. transformers 5 saves no spiece.model.

    Raises FileNotFoundError if the folder has neither file, and ValueError if the file cannot be read.
    """
    file, fast = folder.path / "spiece.model", folder.path / "tokenizer.json"
    if not file.exists() and not fast.exists():
        raise folder.missing("spiece.model or tokenizer.json, T5's tokenizer")
    try:
        if file.exists():
            return SentencePieces(file.read_bytes())
        return SentencePieces(sentencepiece_model(json.loads(fast.read_text(encoding="utf-8"))))
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file if file.exists() else fast, error) from error


def sentencepiece_model(fields: dict[str, Any]) -> bytes:
    """Return the bytes of a spiece.model that has the tokens, the scores and the character normalisation of a
    tokenizer.json.

    Args:
        fields: the content of tokenizer.json.

    Raises ValueError if the tokenizer is not T5's Unigram tokenizer.
    """
    unigram, normalizers = fields["model"], [fields["normalizer"]]
    if unigram["type"] != "Unigram" or unigram.get("byte_fallback"):
        raise ValueError(f"it holds a {unigram['type']} tokenizer, wanted T5's Unigram")
    added, vocabulary = {token["content"] for token in fields["added_tokens"]}, list(unigram["vocab"])
    while vocabulary[-1][0] in added:  # tokens such as <extra_id_0> are at the end and are not in spiece.model
        vocabulary.pop()
    message = []
    for id, (piece, score) in enumerate(vocabulary):
        kind = UNKNOWN if id == unigram["unk_id"] else CONTROL if piece in added else NORMAL
        numbers = b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])  # field 2 is a float, field 3 an integer
        message.append(_field(1, _field(1, piece.encode()) + numbers))
    for each in normalizers:  # this list grows, since some normalizers are sequences
        if each is not None and "normalizers" in each:
            normalizers += each["normalizers"]
        elif each is not None and each["type"] == "Precompiled":
            message.append(_field(3, _field(2, base64.b64decode(each["precompiled_charsmap"]))))
    return b"".join(message)


def _field(number: int, content: bytes) -> bytes:
    """Return the encoding of a protobuf field: its key, the length of its content as a varint, and its content."""
    size, rest = b"", len(content)
    while rest > 127:
        size, rest = size + bytes([128 | rest & 127]), rest >> 7
    return bytes([number << 3 | 2]) + size + bytes([rest]) + content
