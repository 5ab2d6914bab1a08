"""The fault drill: what bigtx promises when things go wrong, tried with real processes, files and signals.

__main__.py     the command
catalogue.py    the list of faults, and the result of one
scene.py        what the faults share: trainings that are started, disturbed, resumed and compared
inject.py       `bigtx pretrain` with a fault inside its processes
page.py         the table in docs/reliability.md
processes.py, checkpoints.py, resumes.py, numbers.py, corpus.py, folders.py, tracking.py   the faults

docs/reliability.md explains the promises.
"""
