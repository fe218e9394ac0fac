"""Figures that others publish of their own kernels, and that no run here has repeated.

Theirs, as they state them for an H200 at T=8192, H=4096, V=128256, bf16. QuACK and Liger's CuTe operator need libraries
too large to bring to a GPU machine without a network.
"""

PUBLISHED = {
    "Liger, CuTe per-token log-probs, forward": "788 TFLOP/s",
    "Liger, CuTe per-token log-probs, backward": "763 TFLOP/s; with the recomputation forward and backward 44.8 ms",
    "QuACK, linear cross entropy to a scalar": "811 TFLOP/s",
    "TRL, its log-prob kernel of one read, from logits": "93 % of copy bandwidth",
}
