"""Recordings as examples and batches of features, for `transcribe`.

Record ──header──▶ SpeechExample ──decode, log-mel, augment──▶ features
                                          ▲ a cache of limited size
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.config.shape import frames_per_column, num_columns
from bigtx.data.recordings import AudioPlace, BadAudioError, Found, decode, num_resampled, read_header
from bigtx.data.records.record import BadRecordError, Record
from bigtx.data.spectrogram import LogMel, changes_waveform, generator, masked, perturbed
from bigtx.finetuning.tasks.batch import LENGTH_MULTIPLE
from bigtx.utils.errors import DataError


@dataclass(frozen=True, slots=True)
class SpeechExample:
    """A recording and its text.

    Attributes:
        place: the place of its samples.
        where: its record, for errors.
        length: the number of columns that the encoder reads.
        text: the text; "" if it is not known.
        ids: int32, the ids of the text.
        num_cut: the number of columns and ids that were left out.
    """

    place: AudioPlace
    where: str
    length: int
    text: str
    ids: np.ndarray
    num_cut: int


@dataclass
class Cache:
    """A cache of the tensors that were used last, up to a number of bytes; several threads may use it."""

    max_bytes: int
    held: OrderedDict[Any, Tensor] = field(default_factory=OrderedDict)
    num_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key, and make it if the cache does not hold it."""
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        value = make()
        if value.nbytes <= self.max_bytes:
            with self.lock:
                self.num_bytes += value.nbytes - (self.held.pop(key).nbytes if key in self.held else 0)
                self.held[key] = value
                while self.num_bytes > self.max_bytes:
                    self.num_bytes -= self.held.popitem(last=False)[1].nbytes
        return value


class SpeechFeatures:
    """The features of recordings, as the config defines them."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.settings, self.seed = config.transcribe, config.seed
        self.too_long = config.data.too_long
        self.rate = config.model.audio.sample_rate
        self.model = config.model
        self.max_samples = max(1, math.floor(self.settings.max_seconds * self.rate))
        self.log_mel = LogMel(config.model.audio)
        self.changes_waveform = changes_waveform(self.settings)
        self.cache = Cache(config.transcribe.cache_size)
        self.known: Mapping[AudioPlace, Found] = {}

    def place(self, record: Record, name: str) -> AudioPlace:
        """Return the place of a record's recording: in the record, or in a file relative to the record's file.

        Raises:
            BadRecordError: the record names no recording, or there is no such file.
        """
        value = record.value(name)
        if isinstance(value, AudioPlace):
            return value
        path = Path(record.file).parent / record.text(name, setting="data.fields.audio")
        try:
            return AudioPlace(str(value), str(path), 0, path.stat().st_size)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadRecordError(f"the recording {path} cannot be read: {reason}") from None

    def num_samples(self, place: AudioPlace) -> tuple[int, int]:
        """Return the numbers of samples that are used and that are left out, at the model's rate: as found when the
        recording was decoded (`known`), or by its header.

        Raises:
            BadRecordError: the recording is empty or invalid, or too long with data.too_long=refuse.
        """
        try:
            found = self.known.get(place) or read_header(place)
            if isinstance(found, str):
                raise BadAudioError(found)
            total, rate = found
        except BadAudioError as error:
            raise BadRecordError(f"{place.name}: {error}") from None
        samples = num_resampled(total, rate, self.rate)
        if samples > self.max_samples and self.too_long == "refuse":
            raise BadRecordError(
                f"{place.name}: {samples / self.rate:.1f} s, and transcribe.max_seconds={self.settings.max_seconds:g} "
                "are allowed; data.too_long=truncate cuts it"
            )
        return min(samples, self.max_samples), max(0, samples - self.max_samples)

    def num_columns(self, num_samples: int) -> int:
        """Return the number of columns that the encoder reads for a number of samples."""
        return num_columns(self.model, num_samples)

    def features(self, example: SpeechExample, number: int | None) -> Tensor:
        """Return the features of a recording, fp32 [F, M].

        Args:
            number: the number of the record in the run, which determines its augmentation; None for no augmentation.

        Raises:
            DataError: the recording cannot be decoded.
        """
        if not self.changes_waveform:
            features = self.cache.get(example.place, lambda: self.log_mel(self._wave(example)))
            return features if number is None else masked(features, self.settings, generator(self.seed, number))
        wave = self.cache.get(example.place, lambda: torch.from_numpy(self._wave(example))).numpy()
        if number is None:
            return self.log_mel(wave)
        draw = generator(self.seed, number)
        return masked(self.log_mel(perturbed(wave, self.settings, draw)), self.settings, draw)

    def check(self, example: SpeechExample) -> None:
        """Decode a recording whose features are needed next.

        Raises:
            BadRecordError: the recording cannot be decoded.
        """
        try:
            self.features(example, None)
        except DataError as error:
            raise BadRecordError(str(error).removeprefix(f"{example.where}: ")) from None

    def _wave(self, example: SpeechExample) -> np.ndarray:
        try:
            return decode(example.place, self.rate, self.max_samples)
        except BadAudioError as error:
            raise DataError(f"{example.where}: the recording {example.place.name} cannot be used: {error}") from None

    def together(self, examples: Sequence[SpeechExample], numbers: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Return the features of a batch, fp32 [B, F, M], and the numbers of frames, int64 [B]."""
        drawn: Sequence[int | None] = [None] * len(examples) if numbers is None else numbers
        parts = [self.features(example, number) for example, number in zip(examples, drawn, strict=True)]
        multiple = LENGTH_MULTIPLE * frames_per_column(self.model)
        frames = -(-max(len(part) for part in parts) // multiple) * multiple
        features = torch.zeros(len(parts), frames, parts[0].shape[1])
        for row, part in zip(features, parts, strict=True):
            row[: len(part)] = part
        lengths = torch.tensor([len(part) for part in parts])
        return (features.pin_memory(), lengths.pin_memory()) if torch.cuda.is_available() else (features, lengths)
