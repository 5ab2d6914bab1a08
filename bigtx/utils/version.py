"""The version of bigtx, where every layer can import it; a test compares it with pyproject.toml."""

__version__ = "0.1.0"
