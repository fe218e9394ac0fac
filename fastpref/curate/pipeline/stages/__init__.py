"""One stage of `fastpref curate` per file: the options of its table, and its function State -> State.

What a stage decides goes into the state, what it found into its summary, and what the user should know is warned. A
stage is listed in `pipeline.config`, by a field and in STAGE_FUNCTIONS; its flags are those of the command.
"""
