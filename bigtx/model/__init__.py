"""The Transformer: its parts, its loss, its initial weights, and generation."""
