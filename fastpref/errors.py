"""The exceptions of fastpref; everything else that it raises is a TypeError, ValueError or RuntimeError."""


class InputError(ValueError):
    """Something the user can mend; the command line prints its message as one line and exits with code 2."""


class CudaError(RuntimeError):
    """A CUDA call of the native core failed."""

    __module__ = "fastpref"
