"""Recordings are decoded once before a run: each by one process, and again only when they have changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sounds import RATE, tone, wav

from bigtx.data import recordings
from bigtx.data.recordings import AudioPlace, examine


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def counted(place: AudioPlace) -> tuple[int, int]:
        names.append(place.name)
        return examine(place)

    monkeypatch.setattr(recordings, "examine", counted)
    return names


def write(folder: Path, count: int) -> list[AudioPlace]:
    for number in range(count):
        (folder / f"{number}.wav").write_bytes(wav(tone(500 + number)))
    return [place_of(folder / f"{number}.wav") for number in range(count)]


def place_of(path: Path) -> AudioPlace:
    return AudioPlace(path.name, str(path), 0, path.stat().st_size)


def test_good_ones_are_remembered_and_bad_ones_are_not(tmp_path: Path, decoded: list[str]) -> None:
    places, memory = write(tmp_path, 4), tmp_path / recordings.FILE
    good = (len(tone(500)), RATE)
    (tmp_path / "2.wav").write_bytes(wav(tone(500))[:500])
    places[2] = place_of(tmp_path / "2.wav")
    places.append(AudioPlace("in a tar.gz", "a.tar.gz", 512, 1, wav(tone(500))))
    found = recordings.look_at([*places, places[0]], memory=memory)
    assert sorted(decoded) == ["0.wav", "1.wav", "2.wav", "3.wav", "in a tar.gz"]
    assert "cut short" in str(found.pop(places[2])) and set(found.values()) == {good}
    (tmp_path / "2.wav").write_bytes(wav(tone(500)))
    os.utime(tmp_path / "0.wav", ns=(1, 1))
    places[2] = place_of(tmp_path / "2.wav")
    decoded.clear()
    assert set(recordings.look_at(places, memory=memory).values()) == {good} and sorted(decoded) == ["0.wav", "2.wav"]
    decoded.clear()
    memory.write_text("[" + memory.read_text())
    assert set(recordings.look_at(places, memory=memory).values()) == {good} and len(decoded) == 5, (
        "a damaged memory is none"
    )
    for damaged in ('[["a"], 0, 1, 1, 1, 1]', "7", "[1]", '["a", 1, null]', "[" * 5000):
        memory.write_text(f"{damaged}\n")
        assert len(recordings.look_at(places, memory=memory)) == 5
    memory.unlink()
    memory.mkdir()
    assert len(recordings.look_at(places, memory=memory)) == 5, "one that cannot be written is none either"
    os.remove(tmp_path / "3.wav")
    assert "cannot be read" in str(recordings.look_at(places)[places[3]])


def test_each_process_decodes_its_share_and_knows_all(tmp_path: Path, decoded: list[str]) -> None:
    places, parts = write(tmp_path, 5), []

    def gather(own: list[object]) -> list[list[object]]:
        parts.append(own)
        return parts

    with pytest.raises(KeyError):  # The other's share is missing here.
        recordings.look_at(places, share=(0, 2), gather=gather)
    assert sorted(decoded) == ["0.wav", "2.wav", "4.wav"]
    assert len(recordings.look_at(places, share=(1, 2), gather=gather)) == 5 and sorted(decoded[3:]) == [
        "1.wav",
        "3.wav",
    ]


def test_a_long_recording_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtx.data.recordings.BLOCK_SAMPLES", 300)
    content = wav(np.stack([tone(500), tone(700)], axis=1))
    assert examine(AudioPlace("a.wav", "a.wav", 0, len(content), content)) == (len(tone(500)), RATE)
