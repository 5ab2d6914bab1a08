"""What a run will need, reckoned from its config alone."""
