"""Rows of samples, and files of them."""

import json

GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0.5]}


USER = [{"role": "user", "content": "hello"}]
CLEVER = [{"role": "assistant", "content": "naïve"}]


def write_lines(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path
