"""Prepare spoken digits for `task=transcribe`: python tools/recipes/spoken_digits.py RECORDINGS OUTPUT

RECORDINGS has <digit>_<speaker>_<index>.wav files, as the Free Spoken Digit Dataset names them. The program writes two
kinds of manifests to OUTPUT, whose texts are the digits' names:

    train.jsonl, validation.jsonl, test.jsonl            single recordings
    train_strings.jsonl, ..., test_strings.jsonl         3 to 7 recordings joined, written to strings/

Recordings are held out by index: those that end in 9 are the test, those that end in 8 the validation, and a string
joins only recordings of its own part. In every second string all digits have the same speaker. The digits of a test
string follow each other without a gap; half of the training strings have up to a fifth of a second of silence before
each digit. The random seed is fixed: the same recordings give the same files.
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
    """A recording of one digit."""

    path: Path
    digit: int
    speaker: str
    index: int

    @property
    def part(self) -> str:
        """Return the part that it belongs to."""
        return {9: "test", 8: "validation"}.get(self.index % 10, "train")


def find(folder: Path) -> list[Recording]:
    """Find the recordings of a folder, in an order that only their names determine."""
    found = []
    for path in folder.glob("*.wav"):
        if match := NAMED.fullmatch(path.name):
            found.append(Recording(path, int(match[1]), match[2], int(match[3])))
    return sorted(found, key=lambda recording: (recording.digit, recording.speaker, recording.index))


def samples(path: Path) -> tuple[np.ndarray, int]:
    """Read int16 [samples] of a mono recording, and the samples per second."""
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
    """Write the strings of a part; return their files and texts."""
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
    """Write a line for each recording, with its path relative to the manifest."""
    with open(path, "w", encoding="utf-8") as file:
        for audio, text in records:
            print(json.dumps({"audio": os.path.relpath(audio, path.parent), "text": text}), file=file)
    print(f"{path}: {len(records):,} records")


def main() -> None:
    """Run the command."""
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
