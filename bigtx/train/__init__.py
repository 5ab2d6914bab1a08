"""The loop and what it needs: tasks, cadences, stop requests, validation, the run folder."""
