"""The low-rank half: robust PCA, singular-value thresholding and Bradley-Terry scores.

What all share      noise · storage
Reads of a matrix   residual_pass · ialm_pass · outliers
One large matrix    one_matrix · large_rpca (rank given) · large_ialm (rank-free)
Many small ones     batched_rpca (rank given) · batched_ialm (rank-free) · batched_verdict · batches
Shared by solvers   annealing (rank given) · ialm (rank-free; also the solver of whole rows and columns)
The functions       rpca, with its result · svt · bradley_terry · curatron, of which only preference_matrix makes use
"""
