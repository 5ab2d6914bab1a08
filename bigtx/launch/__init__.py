"""How the processes of a run are started and kept together. Imports neither torch nor DeepSpeed.

world.py       which processes make up the run: those that a launcher has started, or those to start here
supervisor.py  starts this machine's ranks, passes on requests to stop, and lets no process outlive the run
link.py        connects the supervisors of a run's machines
parents.py     ends a rank in order whose launcher was killed
linux.py       what the kernel does for processes that belong together
"""
