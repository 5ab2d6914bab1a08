"""To and from Hugging Face: tokenizers, configurations, weights and model cards, without running anyone's code."""
