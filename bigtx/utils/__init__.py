"""What every other part may use: errors, files, units, processes, hardware. Imports nothing of bigtx outside itself."""
