"""The command line: flags and words only.

main       parser, dispatch and exit codes; one line registers a command
arguments  types of arguments that several commands share
signals    what a kill does
info       `fastpref info`
curate     `fastpref curate`
denoise/   `fastpref denoise`
demo/      `fastpref demo`
"""
