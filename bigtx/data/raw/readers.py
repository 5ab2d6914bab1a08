"""The reader of each format; files and members of archives are read in the same way."""

from __future__ import annotations

from bigtx.data.raw.formats import Format
from bigtx.data.raw.rows import Reader, read_json, read_json_lines, read_text
from bigtx.data.raw.tables import read_csv, read_tsv

STREAM_READERS: dict[Format, Reader] = {
    Format.TEXT: read_text,
    Format.JSON: read_json,
    Format.JSON_LINES: read_json_lines,
    Format.CSV: read_csv,
    Format.TSV: read_tsv,
}
"""Readers of streams from start to end; parquet and archives need more (parquet.py, samples.py)."""
