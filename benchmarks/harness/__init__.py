"""What every benchmark is measured with.

measure       rounds in which every competitor runs once; clocks, memory, bandwidth, errors against float64
contest       a case from logits or from hidden states: its inputs, its competitors, its record
problem       the same for problems of linear algebra, and the matrices they are given
machine       the facts beside a number: device, versions, commit, settings
verify        fastpref's own tests, without which no number is reported
outcomes      a pytest plugin: one JSON line per test as it ends
report        tables and a plot from a run's JSON; a command

and of benchmarks/gpu.py:

children      processes that are cut short, and begun anew where an item has taken one down
worker        such a process: a command that goes through items by name
place         where it works: a GPU, or the simulator of tests/ptxsim
contact       items: every variant of every kernel once, against float64
gpu_measure   items: the loss half and its peers
gpu_low_rank  items: the low-rank half
gpu_table     which rows are proved, and the short table
"""
