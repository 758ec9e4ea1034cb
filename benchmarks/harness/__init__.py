"""The benchmarks' harness: cases, their checks and facts, results, and the report.

A benchmark file lists its `Case`s. A case builds a `Problem`: the same computation in several
columns, eager PyTorch first. `measure` checks that the columns agree, lets those that do take
turns, and returns a `Result`: plain data, which `results` writes and compares and `report` draws.
"""
