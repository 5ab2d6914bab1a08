"""Typed configuration: the schema, and the one loader of it."""
