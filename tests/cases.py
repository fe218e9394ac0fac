"""Shapes, each with the reason why it is here. Enough rows that PyTorch's own error shows its usual size."""

SHAPES = {
    "one-column": (64, 1),  # V = 1: the target is the whole vocabulary
    "less-than-a-vector": (64, 3),
    "odd": (61, 101),  # nothing divides it: tails and unaligned rows everywhere
    "one-block": (17, 2048),
    "blocks-and-a-tail": (17, 5003),
    "batch": (8, 9, 130),  # [B, T, V]
    "deep": (3, 4, 5, 67),  # more leading dimensions than the kernels know
}
BIG_SHAPES = {
    "llama-3": (8, 128256),
    "gemma": (5, 262144),
    "many-rows": (70001, 3),  # more than 65,535 rows: a limit of grid.y
}
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0, "temperature": 1.3, "scale": 1.5},
}
