"""Lines of text files in any common form: gzipped or not, with or without a byte order mark, UTF-8 or UTF-16. Knows no
fields."""

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
OTHERS = {  # first bytes -> a format that is not text and is not unpacked here
    b"PK\x03\x04": "a zip archive",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "a pointer of git LFS; `git lfs pull` fetches the file itself",
}
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, after surrogateescape


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file, each with its place for error messages; blank lines are left out.

    The format is detected from the bytes, not from the name: gzip (also with several members) from the first two bytes,
    UTF-16 and UTF-32 from their byte order mark or NULs, else UTF-8. A byte order mark before a line is removed.

    Raises OSError when the file cannot be read, and ValueError, with file and line, when it is truncated, damaged, in
    another encoding or format, or changes while it is read.
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
                    # Concatenated files have byte order marks inside
                    yield f"{path}, line {number}", line.lstrip("\ufeff")
            if _state(file) != before:
                raise ValueError(f"{path} changed while it was read; run again when it is complete")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _damaged(path, number, str(error)) from error


def _damaged(path: Path, number: int, found: str) -> ValueError:
    """The error for a file that is intact only up to a line."""
    return ValueError(
        f"{path} cannot be read beyond line {number}: it is cut short or damaged; fetch it again ({found})"
    )


def _not_utf8(path: Path, number: int, line: str, at: int, gzipped: bool) -> ValueError:
    """The error for a line with a byte that is not valid at its place."""
    found = f"byte {ord(line[at]) - 0xDC00:#x} at character {at + 1}"
    if not line.endswith("\n") and at >= len(line) - 3:
        return _damaged(path, number - 1, f"the last line ends within a character: {found}")
    if path.suffix == ".gz" and not gzipped:
        return _damaged(path, number - 1, f"neither gzip nor UTF-8: {found}")
    return ValueError(f"{path}, line {number} is not UTF-8 ({found}); save the file as UTF-8")


def _text(path: Path, opened: io.BufferedReader) -> io.TextIOWrapper:
    """The text of an opened file, unpacked if it is gzipped (even twice)."""
    while opened.peek(2).startswith(GZIP):
        opened = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=opened, mode="rb")))
    start = opened.peek(32)
    other = next((what for mark, what in OTHERS.items() if start.startswith(mark)), None)
    if other is not None:
        raise ValueError(f"{path} is {other}; wanted lines of text, gzipped or not")
    encoding = json.detect_encoding(start)
    return io.TextIOWrapper(opened, encoding=encoding, errors="surrogateescape", newline="\n")


def _state(file: BinaryIO) -> tuple[int, int] | None:
    """A value that changes when the file is written to; None for a pipe, which changes as it is read."""
    found = os.fstat(file.fileno())
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
