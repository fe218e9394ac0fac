"""What fastpref is compared with, a function per peer; a peer that cannot run is reported with the reason.

token     from logits: log-probs of tokens, and a preference step
linear    the same from hidden states and LM head
low_rank  robust PCA, singular-value thresholding, Bradley-Terry fits
published figures that others state of kernels which no run here has
"""
