"""The low-rank half: robust PCA, singular-value thresholding and Bradley-Terry scores."""
