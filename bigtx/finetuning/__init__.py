"""Fine-tuning: records, tasks, the base, and the run."""
