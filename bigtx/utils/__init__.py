"""Helpers for every other part: errors, files, units, processes, hardware. Imports nothing of bigtx outside itself."""
