"""Pretraining: its inputs, its objectives, and the run."""
