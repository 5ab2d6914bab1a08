"""Spoken digits made ready for `task=transcribe`: python tools/recipes/spoken_digits.py RECORDINGS OUTPUT

RECORDINGS holds <digit>_<speaker>_<index>.wav files, as the Free Spoken Digit Dataset names them. OUTPUT gets manifests
of two kinds, whose texts are the digits' names:

    train.jsonl, validation.jsonl, test.jsonl            single recordings
    train_strings.jsonl, ..., test_strings.jsonl         3 to 7 recordings joined, written to strings/

Held out by index: those that end in 9 are the test, those that end in 8 are for choices, and a string joins recordings
of its own part alone. In every second string one speaker says all digits, in the others any. The strings of the test
are joined without anything between; half of those for training have up to a fifth of a second of silence before each
digit. All is drawn from a fixed seed: the same recordings give the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMED = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
SEED = 1
LEAST_DIGITS, MOST_DIGITS = 3, 7
MOST_SILENCE_SECONDS = 0.2
NUM_STRINGS = {"train": 3000, "validation": 200, "test": 400}


@dataclass(frozen=True)
class Recording:
    """One digit, said once."""

    path: Path
    digit: int
    speaker: str
    index: int

    @property
    def part(self) -> str:
        """What it is for."""
        return {9: "test", 8: "validation"}.get(self.index % 10, "train")


def find(folder: Path) -> list[Recording]:
    """The recordings of a folder, in an order that their names alone determine."""
    found = []
    for path in folder.glob("*.wav"):
        if match := NAMED.fullmatch(path.name):
            found.append(Recording(path, int(match[1]), match[2], int(match[3])))
    return sorted(found, key=lambda recording: (recording.digit, recording.speaker, recording.index))


def samples(path: Path) -> tuple[np.ndarray, int]:
    """int16 [samples] of a mono recording, and samples a second."""
    with wave.open(str(path)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            sys.exit(f"{path}: not a mono recording of 16 bits")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


def join(recordings: Sequence[Recording], path: Path, generator: np.random.Generator, *, silence: bool) -> None:
    """Write recordings one after the other into one file."""
    parts, rates = [], set()
    for recording in recordings:
        own, rate = samples(recording.path)
        rates.add(rate)
        if silence:
            parts.append(np.zeros(int(generator.uniform(0, MOST_SILENCE_SECONDS) * rate), "<i2"))
        parts.append(own)
    if len(rates) > 1:
        sys.exit(f"{recordings[0].path.parent}: recordings of several rates: {sorted(rates)}")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rates.pop())
        file.writeframes(np.concatenate(parts).tobytes())


def strings(recordings: Sequence[Recording], part: str, output: Path) -> list[tuple[Path, str]]:
    """Write the strings of a part; their files and texts."""
    generator = np.random.Generator(np.random.Philox(key=[SEED, sorted(NUM_STRINGS).index(part)]))
    own = [recording for recording in recordings if recording.part == part]
    speakers = sorted({recording.speaker for recording in own})
    found = []
    for number in range(NUM_STRINGS[part]):
        speaker = speakers[generator.integers(len(speakers))] if number % 2 else None
        choice = [recording for recording in own if speaker in (None, recording.speaker)]
        length = int(generator.integers(LEAST_DIGITS, MOST_DIGITS + 1))
        chosen = [choice[place] for place in generator.integers(len(choice), size=length)]
        path = output / "strings" / f"{part}-{number:04d}.wav"
        join(chosen, path, generator, silence=part != "test" and number % 4 >= 2)
        found.append((path, " ".join(NAMES[recording.digit] for recording in chosen)))
    return found


def write_manifest(path: Path, records: Sequence[tuple[Path, str]]) -> None:
    """A line for each recording; its path is relative to the manifest."""
    with open(path, "w", encoding="utf-8") as file:
        for audio, text in records:
            print(json.dumps({"audio": os.path.relpath(audio, path.parent), "text": text}), file=file)
    print(f"{path}: {len(records):,} records")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recordings", type=Path, help="folder of <digit>_<speaker>_<index>.wav files")
    parser.add_argument("output", type=Path, help="new folder for manifests and joined strings")
    arguments = parser.parse_args()
    recordings = find(arguments.recordings)
    if not recordings:
        sys.exit(f"{arguments.recordings}: no <digit>_<speaker>_<index>.wav files")
    (arguments.output / "strings").mkdir(parents=True, exist_ok=True)
    for part in NUM_STRINGS:
        singles = [(own.path, NAMES[own.digit]) for own in recordings if own.part == part]
        write_manifest(arguments.output / f"{part}.jsonl", singles)
        write_manifest(arguments.output / f"{part}_strings.jsonl", strings(recordings, part, arguments.output))


if __name__ == "__main__":
    main()
