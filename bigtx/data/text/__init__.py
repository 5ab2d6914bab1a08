"""What may happen to a text before it is tokenized.

    text ──clean──▶ language ──▶ c4 ──▶ filters ──▶ decontaminate ──▶ kept, or dropped with its reason      (rules)
    words ──n-grams──▶ minhash ──signatures of all texts──▶ near ──▶ which documents are near duplicates

`rules.TextRules` applies to a single text all that a config asks for; near duplicates are found later, when every
document has its signature. These and the texts of evaluation sets are found by hashes of words (words.py).
"""
