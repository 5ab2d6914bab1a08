"""Conversion to and from Hugging Face: tokenizers, configurations, weights and model cards, without running foreign
code.
"""
