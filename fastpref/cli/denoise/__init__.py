"""`fastpref denoise`: a file of matrices or comparisons in, what rpca and bradley_terry make of it out."""
