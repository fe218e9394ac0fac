"""Hashes by which texts are known without being held: XXH3 of the UTF-8 of a string, or of the JSON of messages."""

import contextlib
from decimal import Decimal

import numpy as np

from fastpref.curate.files.rows import Row, Text, context_of
from fastpref.errors import InputError

try:
    import orjson
    from xxhash import xxh3_64_digest
except ImportError as error:
    raise InputError(f'reading samples needs {error.name}: pip install "fastpref[cli]"') from error

UNENCODABLE = (UnicodeEncodeError, orjson.JSONEncodeError)  # of a lone surrogate


def text_hash(texts: list[Text]) -> np.ndarray:
    """Returns uint64 [texts]."""
    return as_uint64(b"".join(map(digest, texts)))


def prompt_hash(rows: list[Row]) -> np.ndarray:
    """Returns uint64 [rows], of their prompts with what they are asked beside."""
    return as_uint64(b"".join(map(prompt_digest, rows)))


def digest(text: Text) -> bytes:
    """Returns the 8 bytes of a text's hash, of which the first is the highest."""
    return xxh3_64_digest(text.encode() if isinstance(text, str) else orjson.dumps(text, as_json))


def digests_of(row: Row) -> list[bytes]:
    """Returns the digests of the prompt and of every response. Raises UNENCODABLE for a lone surrogate."""
    if isinstance(row.prompt, str):
        return [prompt_digest(row), *[xxh3_64_digest(text.encode()) for text in row.responses]]
    return [prompt_digest(row), *map(digest, row.responses)]


def as_json(value):
    """Returns what stands in JSON for a value of a Parquet column that it cannot hold."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def prompt_digest(row: Row) -> bytes:
    """Returns the digest of a prompt, and of its tools, images and other context where it has any."""
    context = context_of(row) if row.carried else None
    return digest([row.prompt, context]) if context else digest(row.prompt)


def hashes_of_texts(row) -> list[bytes]:
    """Returns the digest of every text of a row, as a string, as a message and as a part of its conversation."""
    found = []
    for value in row.values() if isinstance(row, dict) else [row]:
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str)]
        messages = [{key: m.get(key) for key in ("role", "content")} for m in values if isinstance(m, dict)]
        if messages and len(messages) == len(values) and all(isinstance(m["content"], str) for m in messages):
            texts += [message["content"] for message in messages]
            with contextlib.suppress(orjson.JSONEncodeError):
                found.append(xxh3_64_digest(orjson.dumps(messages)))
        for text in texts:
            found.append(xxh3_64_digest(text.encode(errors="surrogatepass")))
            for role in ("user", "assistant"):
                with contextlib.suppress(orjson.JSONEncodeError):  # a lone surrogate, which no sample has either
                    found.append(xxh3_64_digest(orjson.dumps([{"role": role, "content": text}])))
    return found


def as_uint64(digests: bytes) -> np.ndarray:
    """Returns digests that stand one behind the other as numbers."""
    return np.frombuffer(digests, ">u8").astype(np.uint64)
