"""The processing of a text before it is tokenized.

    text ──clean──▶ language ──▶ c4 ──▶ filters ──▶ decontaminate ──▶ kept, or dropped with its reason      (rules)
    ngrams ──signatures of all texts──▶ near ──▶ which documents are near duplicates

`rules.TextRules` applies all rules of a config to a single text; near duplicates are found later, when every
document has its signature. Near duplicates and texts of evaluation sets are found by hashes of words (ngrams.py).
"""
