"""Recordings as records: folders, manifests, archives; and what each of them lacks."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sounds import RATE, sayings, tone, wav

from bigtx.data.recordings import AudioPlace, decode
from bigtx.data.records.read import read_records
from bigtx.data.records.record import Broken, Record
from bigtx.utils.errors import DataError


def read(*paths: Path) -> tuple[list[Record], str]:
    broken = Broken()
    records = list(read_records([str(path) for path in paths], broken))
    try:
        broken.check()
    except DataError as error:
        return records, str(error)
    return records, ""


def archive(path: Path, samples: list[tuple[bytes, str]]) -> Path:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for number, (sound, text) in enumerate(samples):
            for suffix, own in (("wav", sound), ("txt", text.encode())):
                member = tarfile.TarInfo(f"a/{number:04d}.{suffix}")
                member.size = len(own)
                file.addfile(member, io.BytesIO(own))
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix == ".gz" else content.getvalue())
    return path


def test_a_folder_and_its_files_are_the_same_records(tmp_path: Path) -> None:
    for number, (sound, text) in enumerate(sayings(12)):
        (tmp_path / f"{number}.wav").write_bytes(sound)
        (tmp_path / f"{number}.txt").write_text(text + "\n")
    records, problems = read(tmp_path)
    assert not problems and [record.fields["audio"].name for record in records] == [f"{n}.wav" for n in range(12)]
    assert [record.fields["text"].strip() for record in records] == [text for _, text in sayings(12)]
    assert records == read(tmp_path / "*.wav")[0] and records[3].where == str(tmp_path / "3.wav")
    (tmp_path / "3.txt").unlink()
    records, problems = read(tmp_path)
    assert not problems and "text" not in records[3].fields, "for predictions it need not be there"
    (tmp_path / "4.wav").unlink()
    assert f"{tmp_path / '4.txt'}: a text without a recording next to it" in read(tmp_path)[1]


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_an_archive_keeps_places_and_not_bytes(tmp_path: Path, name: str) -> None:
    samples = sayings(5)
    records, problems = read(archive(tmp_path / name, samples))
    assert not problems and [record.fields["text"] for record in records] == [text for _, text in samples]
    for record, (sound, _) in zip(records, samples, strict=True):
        place = record.fields["audio"]
        assert isinstance(place, AudioPlace) and (place.content is None) == (name == "shard.tar")
        assert place.read() == sound and str(place) == f"{place.name} ({len(sound)} bytes)"


def test_a_cut_archive_is_told(tmp_path: Path) -> None:
    path = archive(tmp_path / "shard.tar", sayings(5))
    path.write_bytes(path.read_bytes()[:9000])
    assert f"{path}: truncated inside of" in read(path)[1]


def test_long_names_move_no_recording(tmp_path: Path) -> None:
    """Extended headers stand between a member's header and its bytes."""
    sound = wav(tone(500))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as file:
            for number in range(2):
                member = tarfile.TarInfo(f"{'long' * 60}/{number}.wav")
                member.size = len(sound)
                file.addfile(member, io.BytesIO(sound))
        records, problems = read(tmp_path / "long.tar")
        assert not problems and len(records) == 2
        for record in records:
            np.testing.assert_allclose(decode(record.fields["audio"], RATE), tone(500), atol=1e-3)
