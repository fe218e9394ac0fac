"""One claim of the literature per file: TITLE, CLAIMS, arms(setting). `task` is what all share, `run` the command."""
