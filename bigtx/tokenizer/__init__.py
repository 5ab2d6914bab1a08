"""Conversion between text and token ids, without loss.

    documents ──sample──▶ train ──▶ tokenizer.model ──┐
                                                      ├──▶ Tokenizer: encode, decode, stream, fingerprint
    an own model (sentencepiece, Hugging Face) ───────┘

A tokenizer is a folder: `tokenizer.model` (sentencepiece) or `tokenizer.json` (Hugging Face), and next to it
`bigtx_tokenizer.json` with its kind, its special ids and the fingerprint by which corpora and runs check that they use
the same ids. `bigtx tokenizer train` adds `recipe.json`: the settings and the input that it was made from. The settings
of a Hugging Face tokenizer (`tokenizer_config.json` and similar files) are kept unchanged.
"""
