"""Shapes, each with the reason why it is here."""

SHAPES = {
    "one-column": (3, 1),  # V = 1: the target is the whole vocabulary
    "less-than-a-vector": (5, 3),
    "odd": (7, 101),  # nothing divides it: tails and unaligned rows everywhere
    "one-block": (4, 2048),
    "blocks-and-a-tail": (3, 5003),
    "batch": (2, 3, 130),  # [B, T, V]
    "deep": (2, 2, 3, 67),  # more leading dimensions than the kernels know
}
BIG_SHAPES = {
    "llama-3": (2, 128256),
    "gemma": (2, 262144),
    "many-rows": (70001, 3),  # more than 65,535 rows: a limit of grid.y
}
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0, "temperature": 1.3, "scale": 1.5},
}
