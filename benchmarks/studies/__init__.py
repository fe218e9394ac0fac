"""Questions that a table answers, each a command that is run by its path.

accuracy  errors against float64 of fastpref and its peers
recovery  how often rpca finds the matrix that was put in
files     pairs from a large file: seconds, responses per second, memory
recipes   what papers claim about preference data, on a controlled task (recipes/run.py)
"""
