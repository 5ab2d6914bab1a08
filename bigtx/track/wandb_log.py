"""Read the local log of a W&B run (`run-ID.wandb`).

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) after a header of 7 bytes. It has blocks of 32
KiB with chunks of (checksum u32, length u16, type u8, payload). The types are full 1, first 2, middle 3, last 4. The
joined payloads of a record's chunks are a `wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b":W&B"
_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the serialized records of a log, up to its end or to a record that a crash left incomplete."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        return
    position = _HEADER_BYTES
    record = b""
    while position + _CHUNK_HEADER.size <= len(data):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _CHUNK_HEADER.size:
            position += left_in_block
            continue
        checksum, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        payload = data[position + _CHUNK_HEADER.size : position + _CHUNK_HEADER.size + length]
        is_whole = len(payload) == length and zlib.crc32(payload, zlib.crc32(bytes([kind]))) == checksum
        if not is_whole or not _FULL <= kind <= _LAST:
            return
        position += _CHUNK_HEADER.size + length
        record = payload if kind in (_FULL, _FIRST) else record + payload
        if kind in (_FULL, _LAST):
            yield record


def last_step(folder: Path, run_id: str) -> int:
    """Return the highest step in all local logs of a run, -1 if there is none.

    Args:
        folder: the run folder, which contains `wandb/`.
        run_id: the id of the run in W&B.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    highest = -1
    for path in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        for text in read_records(path):
            record = Record.FromString(text)
            if record.WhichOneof("record_type") == "history":
                highest = max(highest, record.history.step.num)
    return highest
