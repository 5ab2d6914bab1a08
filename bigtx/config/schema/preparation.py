"""Preparation: from raw text to a tokenizer and to shards; the settings, and the rules between them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

from bigtx.config.nodes import Problem
from bigtx.config.settings import field
from bigtx.utils.files import is_url


@dataclass(kw_only=True)
class InputConfig:
    """Raw text: the files, and the place of the text in them."""

    paths: list[str] = field(factory=list, kind="path")
    """Files, folders, globs, {000..010}: text, .jsonl, .csv, .tsv, .parquet, .tar; also https://, s3://, gs://."""
    text_field: str = "text"
    """Key or column of the text; a name with dots leads through nested records: article.body."""
    id_field: str = ""
    """Key or column of a document's own id. Empty: none; text files have their path within the folder as id."""
    source_field: str = ""
    """Key or column that says where a document is from. Empty: none."""
    language_field: str = ""
    """Key or column of a document's language. Empty: none."""
    quoted_fields: bool = True
    """Whether fields of .csv and .tsv may be in quotation marks (RFC 4180); false reads the marks as text."""
    text_suffixes: list[str] = field(factory=lambda: [".txt", ".md"])
    """Suffixes of files that are one document each; other files of a folder are skipped and counted."""
    exclude: list[str] = field(factory=list)
    """Files and folders to leave out of folders and globs: names at any depth (test, '*.min.md') or paths
    ('api/*.txt').
    """
    document_per_line: bool = False
    """Whether each line of a text file is a document of its own."""
    max_rejects: float = field(0.001, minimum=0.0, maximum=1.0)
    """Share of unreadable documents above which the job ends with an error; each is listed in rejects.jsonl."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for missing files."""
        if not self.paths:
            yield Problem("input.paths", "", "is empty; name files, folders or globs, e.g. input.paths=texts/")
        yield from path_problems("input.paths", self.paths)


@dataclass(kw_only=True)
class TokenizerTrainConfig:
    """Training of a sentencepiece tokenizer on text files."""

    input: InputConfig = field(factory=InputConfig)
    output: str = field("", kind="path")
    """Folder of the new tokenizer."""
    vocab_size: int = field(16_384, kind="count", minimum=384, maximum=2**31 - 1)
    """Number of ids, including the reserved ones (105 and the chat roles) and the 256 bytes."""
    method: Literal["bpe", "unigram"] = "bpe"
    """Byte-pair encoding (arXiv:1508.07909) or a unigram language model (arXiv:1804.10959)."""
    max_bytes: int = field(100_000_000, kind="size", minimum=1)
    """Text to train on; of a larger input a seeded sample of this size is drawn, by the hashes of its parts."""
    split_digits: bool = True
    """Whether each digit is a piece of its own."""
    whitespace_pieces: bool = True
    """Whether runs of white space may be one piece (good for source code)."""
    chat_roles: list[str] = field(factory=lambda: ["system", "user", "assistant", "tool"])
    """Names of chat roles; each gets a reserved id."""
    user_defined_symbols: list[str] = field(factory=list)
    """Texts that are always one piece each, never split or joined with others, e.g. ['<code>', '</code>']."""
    character_coverage: float = field(0.9995, minimum=0.98, maximum=1.0)
    """Share of the text whose characters get pieces; the rarest others are encoded as bytes. A small vocabulary needs
    a smaller share for scripts with thousands of characters, such as Chinese."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1)
    """Seed of the sample."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, and for files that do not exist."""
        yield from self.input.problems()
        if not self.output:
            what = "is not given; name the folder of the new tokenizer, e.g. output=runs/tokenizer"
            yield Problem("output", "", what)


@dataclass(kw_only=True)
class CleanConfig:
    """Changes of each text before anything else. None by default."""

    repair_unicode: bool = False
    """Repair wrongly decoded text, stray HTML entities and control characters, by ftfy; the extra `clean`."""
    replace_emails: bool = False
    """Replace mail addresses by email@example.com."""
    replace_ip_addresses: bool = False
    """Replace public IP addresses by 192.0.2.1 or 2001:db8::1 (also version numbers that look like one)."""


@dataclass(kw_only=True)
class FilterConfig:
    """Filters that leave documents out. None by default; a group switches on the limits of its paper.

    A limit that is given replaces the limit of its group, and holds alone if the group is off; a limit without effect,
    such as min_words=0 or max_bullet_lines=1, removes a rule from its group. Words are separated by white space.
    """

    gopher_quality: bool = False
    """Gopher's rules of quality (arXiv:2112.11446, A.1): min_words to min_stop_words below."""
    gopher_repetition: bool = False
    """Gopher's rules of repetition (arXiv:2112.11446, table A1): max_duplicate_lines to max_duplicate_ngrams below."""
    c4: bool = False
    """C4's rules (arXiv:1910.10683, 2.2), without its word list: unsuitable lines are removed, unsuitable pages left
    out.
    """
    languages: list[str] = field(factory=list)
    """Languages to keep, e.g. [en, de], by the document's own language if it has one, else detected (the extra
    `language`).
    """
    min_language_probability: float = field(0.65, minimum=0.0, maximum=1.0)
    """Least probability of a detected language (FineWeb's, arXiv:2406.17557)."""

    min_words: Optional[int] = field(None, kind="count", minimum=0)
    """Fewest words of a document; Gopher: 50."""
    max_words: Optional[int] = field(None, kind="count", minimum=1)
    """Most words of a document; Gopher: 100,000."""
    min_mean_word_length: Optional[float] = field(None, minimum=0.0)
    """Least mean of characters in a word; Gopher: 3."""
    max_mean_word_length: Optional[float] = field(None, minimum=0.0)
    """Largest mean of characters in a word; Gopher: 10."""
    max_symbol_ratio: Optional[float] = field(None, minimum=0.0)
    """Most hash signs per word, and most ellipses per word; Gopher: 0.1."""
    max_bullet_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that begin with a bullet; Gopher: 0.9."""
    max_ellipsis_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that end with an ellipsis; Gopher: 0.3."""
    min_alphabetic_words: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Least share of words with a letter in them; Gopher: 0.8."""
    min_stop_words: Optional[int] = field(None, minimum=0, maximum=8)
    """How many of `the be to of and that have with` must be in the text; Gopher: 2. For English only."""

    max_duplicate_lines: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of lines that occur earlier in the document; Gopher: 0.3."""
    max_duplicate_line_characters: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """The same share, by characters; Gopher: 0.2."""
    max_duplicate_paragraphs: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """Largest share of paragraphs that occur earlier in the document; Gopher: 0.3."""
    max_duplicate_paragraph_characters: Optional[float] = field(None, minimum=0.0, maximum=1.0)
    """The same share, by characters; Gopher: 0.2."""
    max_top_ngrams: list[float] = field(factory=list, minimum=0.0, maximum=1.0)
    """Largest share of characters in the most frequent 2-, 3-, ... gram of words; Gopher: [0.2, 0.18, 0.16]."""
    max_duplicate_ngrams: list[float] = field(factory=list, minimum=0.0, maximum=1.0)
    """Largest share of characters in repeated 5-, 6-, ... grams; Gopher: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1]."""

    terminal_punctuation: Optional[bool] = None
    """Remove lines that end without a terminal punctuation mark; C4: true (FineWeb uses C4's rules without it)."""
    min_line_words: Optional[int] = field(None, minimum=0)
    """Remove lines of fewer words; C4: 5."""
    min_sentences: Optional[int] = field(None, minimum=0)
    """Fewest sentences of the lines that remain; C4: 3."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for limits in the wrong order."""
        for name in ("words", "mean_word_length"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                what = f"is above filters.max_{name}={most}, so no document could be kept"
                yield Problem(f"filters.min_{name}", str(least), what, related=(f"filters.max_{name}",))


@dataclass(kw_only=True)
class NearDuplicateConfig:
    """Filter that leaves out documents that are almost equal to an earlier one: MinHash (Broder 1997) with
    locality-sensitive bands.

    Two documents with the Jaccard similarity s of their n-grams are compared with the probability
    1 - (1 - s^rows_per_band)^num_bands, and the later one is left out if their signatures agree by `threshold`.
    """

    enabled: bool = False
    """Whether to search for near duplicates."""
    threshold: float = field(0.8, minimum=0.0, maximum=1.0)
    """Similarity from which a document counts as a near duplicate."""
    ngram: int = field(5, minimum=1, maximum=1000)
    """Words of an n-gram; they are compared in lower case and without punctuation."""
    num_bands: int = field(14, minimum=1, maximum=10_000)
    """Bands of a signature (FineWeb: 14 of 8 rows, arXiv:2406.17557); documents that share one are compared."""
    rows_per_band: int = field(8, minimum=1, maximum=10_000)
    """Hashes of a band; num_bands times this number are a signature, 2 bytes each."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1)
    """Seed of the hash functions."""


@dataclass(kw_only=True)
class DecontaminateConfig:
    """Filter that leaves out documents that share an n-gram of words with evaluation sets. None by default."""

    paths: list[str] = field(factory=list, kind="path")
    """Evaluation sets: files, folders or globs, in the formats of input.paths."""
    text_field: str = "text"
    """Key of the text in JSON lines."""
    document_per_line: bool = False
    """Whether each line of a text file is a text of its own."""
    ngram: int = field(13, minimum=2, maximum=1000)
    """Words in a row that must be equal, in lower case and without punctuation (GPT-3, arXiv:2005.14165: 13)."""
    min_words: int = field(8, minimum=2, maximum=1000)
    """Evaluation texts shorter than an n-gram are compared as a whole if they have this many words (GPT-3: 8)."""


@dataclass(kw_only=True)
class PrepareConfig:
    """Preparation of text files as tokenized shards."""

    input: InputConfig = field(factory=InputConfig)
    output: str = field("", kind="path")
    """Folder of the prepared corpus."""
    tokenizer: str = field("", kind="path")
    """Folder of the tokenizer."""
    clean: CleanConfig = field(factory=CleanConfig)
    filters: FilterConfig = field(factory=FilterConfig)
    near_duplicates: NearDuplicateConfig = field(factory=NearDuplicateConfig)
    decontaminate: DecontaminateConfig = field(factory=DecontaminateConfig)
    validation_fraction: float = field(0.005, minimum=0.0, maximum=0.5)
    """Share of the documents held out, chosen by a hash of the text."""
    block_tokens: int = field(262_144, kind="count", minimum=16, maximum=2**31 - 1)
    """Tokens of a block, the unit of reading and shuffling."""
    shard_size: int = field(67_108_864, kind="size", minimum=1)
    """Least bytes of a shard, except the last; whole blocks. Each shard is written by one process."""
    seed: int = field(1, minimum=0, maximum=2**63 - 1)
    """Seed of the document shuffle."""
    exact_duplicates: Literal["remove", "keep"] = "remove"
    """Whether each text is kept once, the first in reading order."""
    memory: int = field(2_147_483_648, kind="size", minimum=1 << 26)
    """Bytes that all processes together may hold in buffers, besides about 100 MiB for each process itself. One text
    may take half of it for the filters and a tokenizer that has to read it as a whole; a longer one is rejected."""
    num_processes: int = field(0, minimum=0, maximum=1024)
    """Tokenizing processes; 0 uses every core."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for settings that do not fit each other, and for files that do not exist."""
        yield from self.input.problems()
        if not self.output:
            yield Problem("output", "", "is not given; name the folder of the prepared corpus, e.g. output=runs/corpus")
        yield from tokenizer_problems("tokenizer", self.tokenizer)
        yield from self.filters.problems()
        yield from path_problems("decontaminate.paths", self.decontaminate.paths)


def path_problems(key: str, paths: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each path or pattern that names nothing; URLs and braces are expanded when they are read."""
    for path in paths:
        if is_url(path) or "{" in path or os.path.exists(path):
            continue
        if not glob.has_magic(path):
            yield Problem(key, path, "no such file or folder")
        elif not any(glob.iglob(path, recursive=True)):
            yield Problem(key, path, "matches no file")


def tokenizer_problems(key: str, folder: str) -> Iterator[Problem]:
    """Yield a problem for the folder of a tokenizer that is not given or does not exist."""
    if not folder:
        yield Problem(key, "", "is not given; name a folder written by `bigtx tokenizer train`")
    elif not os.path.isdir(folder):
        yield Problem(key, folder, "no such folder; name one written by `bigtx tokenizer train`")
