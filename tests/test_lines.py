"""files.lines: lines are read from gzipped or plain files in several encodings; errors name the file and the line."""

import bz2
import codecs
import gzip
import lzma
import os
import threading

import pytest

from pyterrier_lit.files.lines import numbered_lines

TEXT = "q1\tred fox\nq2\tblé → 狐\n"


def read(path):
    return [line for _, line in numbered_lines(path)]


def given(tmp_path, data, name="queries.tsv"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


UTF8, LITTLE, BIG = TEXT.encode(), TEXT.encode("utf-16-le"), TEXT.encode("utf-16-be")
SAME = {
    "as it is": UTF8,
    "marked": codecs.BOM_UTF8 + UTF8,
    "two marked files, one behind the other": b"".join(codecs.BOM_UTF8 + line for line in UTF8.splitlines(True)),
    "UTF-16, little end first": codecs.BOM_UTF16_LE + LITTLE,
    "UTF-16, big end first": codecs.BOM_UTF16_BE + BIG,
    "UTF-16 without a mark, little end first": LITTLE,
    "UTF-16 without a mark, big end first": BIG,
    "UTF-32": TEXT.encode("utf-32"),
}


@pytest.mark.parametrize("name", ["queries.tsv", "queries.tsv.gz"])
@pytest.mark.parametrize("data", SAME.values(), ids=SAME)
def test_the_bytes_say_what_a_file_is_and_not_its_name(tmp_path, data, name):
    assert read(given(tmp_path, data, name)) == TEXT.splitlines(keepends=True)
    assert read(given(tmp_path, gzip.compress(data), name)) == TEXT.splitlines(keepends=True)


def test_gzip_in_several_members_or_twice_is_read_to_its_end(tmp_path):
    members = [codecs.BOM_UTF8 + line.encode() for line in TEXT.splitlines(keepends=True)]
    assert read(given(tmp_path, b"".join(map(gzip.compress, members)))) == TEXT.splitlines(keepends=True)
    assert read(given(tmp_path, gzip.compress(gzip.compress(UTF8)))) == TEXT.splitlines(keepends=True)
    assert read(given(tmp_path, gzip.compress(UTF8) + bytes(512))) == TEXT.splitlines(keepends=True)  # zero padding


def test_only_a_line_feed_ends_a_line_and_empty_lines_are_counted_but_left_out(tmp_path):
    data = "a\u2028b\x0bc\x85d\r\n\r\n \t\n\x00e".encode()
    assert list(numbered_lines(given(tmp_path, data, "x"))) == [
        (f"{tmp_path / 'x'}, line 1", "a\u2028b\x0bc\x85d\r\n"),
        (f"{tmp_path / 'x'}, line 4", "\x00e"),
    ]


LINES = "".join(f"q{i}\t{i**9}\n" for i in range(2_000)).encode()  # longer than one buffer
WRONG = {
    "latin-1": ("q1\tred\nq2\tblé\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9 at character 6\); save the"),
    "late latin-1": (LINES + "q\té\n".encode("latin-1"), r"line 2001 is not UTF-8 \(byte 0xe9"),
    "gzipped latin-1": (gzip.compress("q1\té\n".encode("latin-1")), r"line 1 is not UTF-8 \(byte 0xe9"),
    "cut within a character": ("q1\ta\nq2\tblé".encode()[:-1], "beyond line 1: it is cut short or damaged; fetch it"),
    "half of a gzip": (gzip.compress(LINES)[:-900], r"beyond line \d{3,4}: it is cut short or damaged"),
    "gzip without its end": (gzip.compress(LINES)[:-4], r"beyond line 1\d{3}: it is cut short or damaged"),
    "a wrong sum": (gzip.compress(LINES)[:-8] + bytes(8), r"beyond line 1\d{3}: it is cut short or damaged.*CRC"),
    "words behind gzip": (gzip.compress(LINES) + b"words", r"beyond line 1\d{3}: it is cut short or damaged"),
    "words before gzip": (b"words" + gzip.compress(LINES), "gz cannot be read beyond line 0: .*neither gzip nor UTF-8"),
    "odd UTF-16": (TEXT.encode("utf-16")[:-1], r"beyond line \d: it is cut short or damaged"),
    "an old Mac's": (b"q1\ta\rq2\tb\r", "ends its lines with carriage returns alone; save it with line feeds"),
    "bzip2": (bz2.compress(UTF8), "is packed by bzip2; wanted lines of text, gzipped or not"),
    "xz": (lzma.compress(UTF8), "is packed by xz"),
    "gzipped bzip2": (gzip.compress(bz2.compress(UTF8)), "is packed by bzip2"),
    "zip": (b"PK\x03\x04" + bytes(30), "is a zip archive"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("data, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"queries.tsv.*{message}"):
        read(given(tmp_path, data, "queries.tsv.gz" if "neither" in message else "queries.tsv"))


@pytest.mark.parametrize("data", [LINES + b"more\n", LINES[:9_000]])
def test_a_file_that_somebody_writes_to_while_it_is_read_is_an_error(tmp_path, data):
    path = given(tmp_path, LINES)
    lines = numbered_lines(path)
    next(lines)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"queries.tsv changed while it was read; run again when it is complete"):
        list(lines)


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(UTF8),))
    writer.start()
    assert read(tmp_path / "pipe") == TEXT.splitlines(keepends=True)
    writer.join()
