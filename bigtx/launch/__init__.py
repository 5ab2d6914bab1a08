"""Start the processes of a run and supervise them. This package imports neither torch nor DeepSpeed.

world.py        finds the processes of the run: those that a launcher has started, or those to start here;
                stops a rank cleanly when its launcher was killed
supervisor.py   starts this machine's ranks, forwards requests to stop, and ends all processes when the run ends
link.py         connects the supervisors of a run's machines
consistency.py  compares the code, the packages, the settings, the clocks and the links of the machines,
                and checks that they all see the same folder
"""
