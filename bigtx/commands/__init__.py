"""The commands that join parts which do not know each other."""
