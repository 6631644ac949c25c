"""Vectors of passages from the column `doc_vec`, a dense index or an encoder. If the vector of a passage is missing or
invalid, the error message names the passage's docno. This module does not deal with language models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


def distinct(
    keys: Sequence[Sequence[Any]], docnos: Sequence[Sequence[Any]]
) -> tuple[list[Any], list[Any], list[list[int]]]:
    """Find the distinct keys in Q lists of passages. A key identifies a passage: its docno or its text, for example.

    Args:
        keys: for each list, the keys of its passages.
        docnos: for each list, the docnos of its passages.

    Returns the distinct keys, a docno for each distinct key, and Q lists of indices. A passage's index is the position
    of its key in the distinct keys: for the keys [["a", "b"], ["b"]], the indices are [[0, 1], [1]].
    """
    docno_of = {
        key: docno for row, names in zip(keys, docnos, strict=True) for key, docno in zip(row, names, strict=True)
    }
    row_of = {key: row for row, key in enumerate(docno_of)}
    return list(docno_of), list(docno_of.values()), [[row_of[key] for key in row] for row in keys]


def from_column(values: Sequence[Any], docnos: Sequence[Any]) -> torch.Tensor:
    """Return N values of the column `doc_vec` as a float32 tensor (N, d).

    Args:
        values: the N vectors (arrays, tensors or lists of numbers).
        docnos: the docnos of the N passages, for error messages.

    Raises TypeError if a value is not a vector, and ValueError if two vectors have different lengths.
    """
    rows = []
    for value, docno in zip(values, docnos, strict=True):
        try:
            row = value.float().cpu() if torch.is_tensor(value) else _tensor(list(value))
        except (TypeError, ValueError, RuntimeError):
            row = torch.empty((), device="cpu")
        if row.ndim != 1:
            raise TypeError(
                f"'doc_vec' of docno {docno!r} is {value!r}, not a vector of numbers; load it or drop the row"
            )
        rows.append(row)
        if len(row) != len(rows[0]):
            raise ValueError(
                f"'doc_vec' of docno {docno!r} has {len(row)} dimensions, that of docno {docnos[0]!r} {len(rows[0])};"
                " all must come from one encoder"
            )
    return torch.stack(rows)


def from_index(index: Any, docnos: Sequence[Any]) -> torch.Tensor:
    """Return the vectors of N docnos in a dense index as a float32 tensor (N, d).

    Args:
        index: a pyterrier_dr.FlexIndex.
        docnos: the docnos.

    Raises ValueError if the index has no vector for one of the docnos. The message lists up to five of the missing
    docnos. Raises TypeError if `index` is not a dense index.

    For a missing docno, some indexes raise ValueError. Some return -1, which PyTorch and NumPy would take as the
    position of the last vector. Some return the position of another docno's vector: for "d1", that of "d01". Each
    position is therefore mapped back to a docno, and compared with the docno that was asked for.
    """
    if not hasattr(index, "payload"):
        raise TypeError(
            f"vectors={index!r} is not a dense index; wanted a pyterrier_dr.FlexIndex, or None with a 'doc_vec' column"
        )
    held, vectors, _ = index.payload()
    names = [str(docno) for docno in docnos]
    try:
        numbers = list(held.inv[names])
    except ValueError:
        numbers = [_number(held, name) for name in names]
    known = [int(number) for number in numbers if number >= 0]
    found = iter(held.fwd[known] if known else [])
    right = [number >= 0 and next(found) == name for number, name in zip(numbers, names, strict=True)]
    missing = [name for name, is_right in zip(names, right, strict=True) if not is_right]
    if missing:
        raise ValueError(
            f"{index!r} holds no vectors of {len(missing)} of {len(names)} docnos, such as"
            f" {', '.join(map(repr, missing[:5]))}; index them, or drop them from the ranking"
        )
    return _tensor(vectors[numbers])


def from_encoder(encoder: Any, texts: Sequence[str]) -> torch.Tensor:
    """Encode N texts with a dense encoder. Returns a float32 tensor (N, d).

    Args:
        encoder: a pyterrier_dr.BiEncoder.
        texts: the texts.

    Raises TypeError if `encoder` has no method `encode_docs`.
    """
    if not hasattr(encoder, "encode_docs"):
        raise TypeError(f"encoder={encoder!r} cannot encode passages; wanted a pyterrier_dr.BiEncoder")
    return _tensor(encoder.encode_docs(list(texts)))


def normalised(vectors: torch.Tensor, docnos: Sequence[Any], wanted: int, trained_on: str) -> torch.Tensor:
    """Normalise vectors (N, d) to unit vectors (N, d).

    Args:
        vectors: the vectors.
        docnos: for each vector, the docno of its passage, for error messages.
        wanted: the dimension d that the PE-Rank checkpoint requires.
        trained_on: a description of the encoder that the checkpoint was trained with, for error messages.

    Raises ValueError if the vectors do not have `wanted` dimensions, or if a number in them is not finite.
    """
    if vectors.shape[1] != wanted:
        raise ValueError(
            f"the passage vectors have {vectors.shape[1]} dimensions and this checkpoint reads {wanted}; give it those"
            f" of {trained_on}"
        )
    wrong = torch.nonzero(~vectors.isfinite().all(1)).flatten().tolist()
    if wrong:
        number = next(number for number in vectors[wrong[0]].tolist() if not abs(number) < float("inf"))
        raise ValueError(
            f"the vector of a passage holds {number}: docno {docnos[wrong[0]]!r} ({len(wrong)} of {len(vectors)}"
            " vectors); encode it again"
        )
    return F.normalize(vectors, dim=1)


def _tensor(values: Any) -> torch.Tensor:
    """Return values as a float32 tensor on the CPU, regardless of torch's default dtype and device."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _number(held: Any, name: str) -> int:
    """Return the position of a docno's vector, or -1 if the index raises ValueError. `held` is the index's mapping
    between docnos and positions."""
    try:
        return int(held.inv[[name]][0])
    except ValueError:  # the docno does not have the form of this index's docnos
        return -1
