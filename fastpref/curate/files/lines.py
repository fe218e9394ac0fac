"""Text as whole lines in UTF-8, of any length up to a bound, and the records of CSV, of which some have many lines."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

from fastpref.curate.files.sources import Source, open_unpacked, reading_errors
from fastpref.errors import InputError

CHUNK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 28  # bytes: what unpacks to a single line of gigabytes must not be held
BOM = codecs.BOM_UTF8

# The module's own bound of 128 kB is far below the length of a conversation. It has no bound per reader.
csv.field_size_limit(LONGEST_ROW)

_CSV_ERRORS = (  # what the module says, and what is meant
    ("new-line character", "a carriage return outside of quotes"),
    ("unexpected end of data", "the quotes that begin here do not end"),
    ("expected after", "text behind the quotes that end a field; quotes within a field must be doubled"),
    ("field larger", f"a field of more than {LONGEST_ROW >> 20} MiB"),
)


class Lines(NamedTuple):
    """Whole lines of a source; the last one of all may lack its line feed."""

    begin: int  # byte at which they begin, unpacked and in UTF-8
    lines: bytes
    done: int  # bytes of the file that were read so far


def line_blocks(source: Source, size: int = CHUNK) -> Iterator[Lines]:
    """Reads a source of text in order, in blocks of at least `size` bytes that end where a line ends.

    A byte-order mark stays where the source is UTF-8, so that `begin` is a place in the file.

    Raises:
        InputError: The source cannot be read, or a line is longer than LONGEST_ROW.
    """
    held, length, begin, newlines = [], 0, 0, 0
    with reading_errors(source.name), open_unpacked(source) as stream:
        for chunk in _utf8_chunks(stream, source.encoding, min(size, CHUNK)):
            cut = chunk.rfind(b"\n") + 1
            if cut and length + cut >= size:
                block = b"".join([*held, chunk[:cut]])
                yield Lines(begin, block, stream.packed.tell())
                begin += len(block)
                newlines += block.count(b"\n")
                held, length = [chunk[cut:]], len(chunk) - cut
            else:
                held.append(chunk)
                length += len(chunk)
                if length > LONGEST_ROW + size:
                    newlines += sum(chunk.count(b"\n") for chunk in held) + 1
                    raise InputError(f"{source.name}:{newlines}: a line of more than {LONGEST_ROW >> 20} MiB")
        if length:
            yield Lines(begin, b"".join(held), stream.packed.tell())


def _utf8_chunks(stream, encoding: str, size: int) -> Iterator[bytes]:
    decoder = None if encoding in ("utf-8", "utf-8-sig") else codecs.getincrementaldecoder(encoding)()
    while chunk := stream.read(size):
        yield chunk if decoder is None else decoder.decode(chunk).encode()
    if decoder is not None:
        yield decoder.decode(b"", final=True).encode()


def csv_records(source: Source) -> Iterator[tuple[int, list[str] | ValueError]]:
    """Reads CSV as RFC 4180 has it: the line at which a record begins, and its fields; the first one is the header.

    Blank lines are no records, but for a table of one column, whose missing value they are. A record of another width
    than the header, or with bytes that are no UTF-8, is a ValueError.

    Raises:
        InputError: The source cannot be read, or its quotes do not tell where records end.
    """
    broken = None

    def lines():
        nonlocal broken
        number, held = 0, 0
        for block in line_blocks(source):
            for line in io.BytesIO(block.lines.removeprefix(BOM) if block.begin == 0 else block.lines):
                number += 1
                held = held + len(line) if number > begun else len(line)
                if held > LONGEST_ROW:
                    raise InputError(f"{source.name}:{begun}: {_CSV_ERRORS[1][1]} within {LONGEST_ROW >> 20} MiB")
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    broken = ValueError(f"not UTF-8 at byte {error.start} of line {number}")
                    yield line.decode(errors="replace")

    reader = csv.reader(lines(), delimiter=source.delimiter, strict=True)
    header, begun = None, 1
    while True:
        begun = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = next((meant for said, meant in _CSV_ERRORS if said in str(error)), str(error))
            raise InputError(f"{source.name}:{begun}: not CSV: {reason}") from error
        if not record and (header is None or len(header) != 1):
            continue
        record = record or [""]
        if broken is not None:
            record, broken = broken, None
        elif header is None:
            header = record
        elif len(record) != len(header):
            record = ValueError(f"{len(record)} fields, where the header has {len(header)}")
        elif record == header:
            record = ValueError("this row repeats the header")
        yield begun, record


def json_elements(source: Source) -> Iterator[bytes]:
    """Reads a JSON array, indented or not: each element as JSON on one line, without its line feed.

    Raises:
        InputError: The source cannot be read, or is no JSON array; with the line.
    """
    decoder = json.JSONDecoder()
    text, place, line, first = "", 0, 1, True
    blocks = _text_chunks(source)

    def more() -> bool:
        nonlocal text, place, line
        line += text.count("\n", 0, place)
        rest, place = text[place:], 0
        chunk = next(blocks, None)
        if len(rest) > LONGEST_ROW:
            raise InputError(f"{source.name}:{line}: a row of more than {LONGEST_ROW >> 20} MiB")
        # twice as much each time, for what is read so far is scanned again
        parts = [rest, chunk or ""]
        while chunk and sum(map(len, parts)) < 2 * len(rest):
            chunk = next(blocks, None)
            parts.append(chunk or "")
        text = "".join(parts)
        return len(text) > len(rest)

    def next_mark() -> str:
        """The next character that is no white space; "" at the end."""
        nonlocal place
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            if place < len(text) or not more():
                return text[place : place + 1]

    def error(reason: str, at: int) -> InputError:
        return InputError(f"{source.name}:{line + text.count(chr(10), 0, at)}: not a JSON array: {reason}")

    more()
    if next_mark() != "[":
        raise error("[ expected", place)
    place += 1
    while True:
        mark = next_mark()
        if mark == "]" and first:
            place += 1
            break
        while True:
            try:
                _, end = decoder.raw_decode(text, place)
            except (json.JSONDecodeError, RecursionError) as problem:
                at = getattr(problem, "pos", place)
                cut = at >= len(text) - 16 or "Unterminated" in str(problem)
                if isinstance(problem, RecursionError) or not (cut and more()):
                    reason = getattr(problem, "msg", "too deeply nested")
                    raise error(reason, min(at, len(text))) from problem
                continue
            if end < len(text) or not more():  # a number may go on
                break
        element = text[place:end].encode(errors="surrogatepass")
        yield element.replace(b"\n", b" ").replace(b"\r", b" ")  # white space between its parts: texts escape theirs
        place, first = end, False
        mark = next_mark()
        place += 1
        if mark == "]":
            break
        if mark != ",":
            raise error(f", or ] expected, got {mark!r}" if mark else "it ends within the array", place - 1)
    if mark := next_mark():
        raise error(f"nothing expected behind ], got {mark!r}", place)


def _text_chunks(source: Source) -> Iterator[str]:
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    decoder = codecs.getincrementaldecoder(encoding)()
    with reading_errors(source.name), open_unpacked(source) as stream:
        while chunk := stream.read(CHUNK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
