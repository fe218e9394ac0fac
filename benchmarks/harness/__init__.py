"""What every benchmark is measured with.

measure      rounds in which every competitor runs once; clocks, memory, bandwidth, errors against float64
contest      a case from logits or from hidden states: its inputs, its competitors, its record
problem      the same for problems of linear algebra, and the matrices they are given
machine      the facts beside a number: device, versions, commit, settings
verify       fastpref's own tests, without which no number is reported
outcomes     a pytest plugin: one JSON line per test as it ends
report       tables and a plot from a run's JSON; a command
gpu_measure  what benchmarks/gpu.py runs to measure; a command
"""
