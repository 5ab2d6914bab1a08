"""The version of bigtx, where every layer can see it; a test holds it against pyproject.toml."""

__version__ = "0.1.0"
