"""Text <-> token ids, without loss.

    documents ──sample──▶ train ──▶ tokenizer.model ──┐
                                                      ├──▶ Tokenizer: encode, decode, stream, fingerprint
    a model of one's own (sentencepiece, Hugging Face)┘

A tokenizer is a folder: `tokenizer.model` (sentencepiece) or `tokenizer.json` (Hugging Face), and beside it
`bigtx_tokenizer.json` with its kind, its special ids and the fingerprint by which corpora and runs know that they mean
the same ids. `bigtx tokenizer train` adds `recipe.json`: the settings and the input that it was made from. The settings
that came with a Hugging Face tokenizer (`tokenizer_config.json` and the like) are kept as they were.
"""

from bigtx.tokenizer.stops import StreamDecoder
from bigtx.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
