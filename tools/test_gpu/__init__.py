"""The check of a GPU: what bigtx computes on it and how fast, in phases that do not stop each other.

command.py      the command: starts a process for each phase, and prints the table
plan.py         the phases, their time limits, and the speed that is wanted
table.py        the table
child.py        the process of one phase, and the lines that it writes
timing.py       the time of a call on the device
trainer.py      an engine that trains on random tokens, without a corpus and a launcher
causes.py       where the time of a step goes
environment.py, kernels.py, training.py, loss.py, synchronizations.py, flex.py, checkpoints.py   the phases

docs/performance.md explains how to use it.
"""
