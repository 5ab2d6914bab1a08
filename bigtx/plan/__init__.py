"""Memory, time and parameters of a run, computed from its config."""
