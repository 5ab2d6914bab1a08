"""Pretraining: what it reads, its objectives, and the run."""
