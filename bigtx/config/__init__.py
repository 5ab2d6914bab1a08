"""Typed configuration: the schema and its loader."""
