"""Reads the lines of text files: gzipped or not, with or without a byte order mark, in UTF-8, UTF-16 or UTF-32.

This module does not deal with the fields in a line.
"""

import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

GZIP = b"\x1f\x8b"
OTHERS = {  # first bytes of a file in an unsupported format -> a description of the format
    b"PK\x03\x04": "a zip archive",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "a pointer of git LFS; `git lfs pull` fetches the file itself",
}
UNDECODED = re.compile("[\udc80-\udcff]")  # what Python's "surrogateescape" makes of bytes that are not UTF-8


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (place, line) for each line of a text file, except blank lines. The place, for error messages, is a text
    with the name of the file and the number of the line.

    Compression and encoding are detected from the content of the file, not from its name. A gzipped file, which may
    have several members, is detected from its first two bytes. UTF-16 and UTF-32 are detected from their byte order
    mark or from NUL bytes; other files are UTF-8. A byte order mark at the start of a line is removed.

    Raises OSError if the file cannot be read. Raises ValueError if the file is truncated or damaged, has another
    encoding or format, or changes while it is read; the message names the file and, for a fault in one line, the line.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            before, gzipped, lines = _state(file), file.peek(2).startswith(GZIP), _text(path, file)
            for number, line in enumerate(lines, 1):
                if (byte := UNDECODED.search(line)) is not None:
                    raise _not_utf8(path, number, line, byte.start(), gzipped)
                if number == 1 and not line.endswith("\n") and "\r" in line.rstrip("\r"):
                    raise ValueError(f"{path} ends its lines with carriage returns alone; save it with line feeds")
                if line.strip():
                    # If files with byte order marks were concatenated, a later line can start with such a mark
                    yield f"{path}, line {number}", line.lstrip("\ufeff")
            if _state(file) != before:
                raise ValueError(f"{path} changed while it was read; run again when it is complete")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _damaged(path, number, str(error)) from error


def _damaged(path: Path, number: int, found: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read beyond line {number}: it is cut short or damaged; fetch it again ({found})"
    )


def _not_utf8(path: Path, number: int, line: str, at: int, gzipped: bool) -> ValueError:
    """The error for a line that is not valid UTF-8. at: the index of the first invalid byte in `line`."""
    found = f"byte {ord(line[at]) - 0xDC00:#x} at character {at + 1}"
    if not line.endswith("\n") and at >= len(line) - 3:
        return _damaged(path, number - 1, f"the last line ends within a character: {found}")
    if path.suffix == ".gz" and not gzipped:
        return _damaged(path, number - 1, f"neither gzip nor UTF-8: {found}")
    return ValueError(f"{path}, line {number} is not UTF-8 ({found}); save the file as UTF-8")


def _text(path: Path, opened: io.BufferedReader) -> io.TextIOWrapper:
    while opened.peek(2).startswith(GZIP):
        opened = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=opened, mode="rb")))
    start = opened.peek(32)
    other = next((what for mark, what in OTHERS.items() if start.startswith(mark)), None)
    if other is not None:
        raise ValueError(f"{path} is {other}; wanted lines of text, gzipped or not")
    encoding = json.detect_encoding(start)
    return io.TextIOWrapper(opened, encoding=encoding, errors="surrogateescape", newline="\n")


def _state(file: BinaryIO) -> tuple[int, int] | None:
    """A value that changes when the file is written to. It is None if the file is not a regular file but, for example,
    a pipe."""
    found = os.fstat(file.fileno())
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
