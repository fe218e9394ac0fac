"""The exceptions of fastpref, and texts that are safe to show; everything else it raises is a TypeError, ValueError or
RuntimeError."""


class InputError(ValueError):
    """Something the user can mend; the command line prints its message as one line and exits with code 2."""


class CudaError(RuntimeError):
    """A CUDA call of the native core failed."""

    __module__ = "fastpref"


def printable(text) -> str:
    """The text in one line for a terminal: what is not printable becomes its escape, such as \\x1b, \\n or \\udcff.

    Names of files and columns are other people's: escape codes in them would move the cursor, change the colours or
    rewrite what was said, direction marks would reorder it, and a lone surrogate cannot be written at all.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
