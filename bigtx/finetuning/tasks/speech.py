"""Recordings as examples and batches of features, for `transcribe`.

Record ──header──▶ SpeechExample ──decode, log-mel, augment──▶ features
                                          ▲ a cache of limited size

The log-mel spectrogram is the power spectrum under a Hann window, summed up by triangles on Slaney's mel scale
(M. Slaney, Auditory Toolbox, Technical Report 1998-010, the one that librosa and Whisper use), as logarithms that end
80 dB below the loudest (arXiv:2212.04356, section 2.2, and its published code), shifted and scaled to mean 0 and
deviation 1 over the whole recording, so that loudness has no effect. Shape letters: L samples, F frames, M mel bins.

Recordings are changed each time that they are read, as drawn from (seed, number of the record). SpecAugment
(arXiv:1904.08779) hides bands of time and of frequency; its time warp is left out, which according to the article is
the least important of the three and the most expensive. Before the spectrogram is computed, a recording may be played
faster or slower (T. Ko et al., Audio Augmentation for Speech Recognition, Interspeech 2015) and noise may be added.
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

from bigtx.config.schema import AudioConfig, FinetuneConfig, TranscribeConfig
from bigtx.config.shape import frames_per_column, hop_length, num_frames
from bigtx.data.recordings import AudioPlace, BadAudioError, Found, decode, num_resampled, read_header, resampled
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.batch import padded_length
from bigtx.utils.errors import DataError

MIN_FFT = 512
"""The size of the transform: large enough that the lowest of 80 triangles is wider than a bin at all usual rates."""
LEAST_POWER = 1e-10
DYNAMIC_RANGE = 8.0
"""The range of the spectrogram, in powers of ten below the loudest value."""
LEAST_DEVIATION = 1e-3
"""The deviation of silence, whose spectrogram is flat."""

LINEAR_HERTZ = 200.0 / 3
"""Hertz of one mel below BREAK_HERTZ, where the scale is linear."""
BREAK_HERTZ = 1000.0
LOG_STEP = math.log(6.4) / 27.0
"""The logarithm of the ratio of frequencies of one mel above BREAK_HERTZ."""


class LogMel:
    """The features of one kind of model."""

    def __init__(self, config: AudioConfig) -> None:
        self.config, rate = config, config.sample_rate
        self.window_length = max(1, round(rate * config.window_ms / 1000))
        self.hop = hop_length(config)
        self.fft = max(MIN_FFT, 2 ** math.ceil(math.log2(self.window_length)))
        self.window = torch.hann_window(self.window_length)
        self.filters = torch.from_numpy(mel_filters(config.num_mel_bins, rate, self.fft)).float()

    def __call__(self, wave: np.ndarray) -> Tensor:
        """Return features fp32 [F, M] of a waveform fp32 [L]; frame f is centred on sample f * hop, with zeros
        outside.
        """
        spectrum = torch.stft(
            torch.from_numpy(wave),
            self.fft,
            hop_length=self.hop,
            win_length=self.window_length,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )[:, : num_frames(self.config, len(wave))]
        power = (self.filters @ spectrum.abs().square()).clamp(min=LEAST_POWER).log10()  # M F
        power = power.clamp(min=float(power.max()) - DYNAMIC_RANGE)
        power = (power - power.mean()) / power.std(correction=0).clamp(min=LEAST_DEVIATION)
        return power.t().contiguous()


def mel_filters(num_bins: int, rate: int, fft: int) -> np.ndarray:
    """Return fp64 [num_bins, fft / 2 + 1]: triangles of area one, evenly spaced in mel from 0 Hz to half the rate."""
    corners = _hertz(np.linspace(0.0, _mel(rate / 2), num_bins + 2))
    frequencies = np.linspace(0.0, rate / 2, fft // 2 + 1)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    triangles: np.ndarray = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))
    return triangles


def _mel(hertz: float) -> float:
    if hertz < BREAK_HERTZ:
        return hertz / LINEAR_HERTZ
    return BREAK_HERTZ / LINEAR_HERTZ + math.log(hertz / BREAK_HERTZ) / LOG_STEP


def _hertz(mel: np.ndarray) -> np.ndarray:
    at_break = BREAK_HERTZ / LINEAR_HERTZ
    above: np.ndarray = BREAK_HERTZ * np.exp(LOG_STEP * (np.maximum(mel, at_break) - at_break))
    return np.where(mel < at_break, mel * LINEAR_HERTZ, above)


_STREAM = 7 << 56
"""A label that separates these draws from those of the order of records, which have the same seed."""


def generator(seed: int, number: int) -> np.random.Generator:
    """Return the generator of the record with this number in the run."""
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM | number]))


def changes_waveform(config: TranscribeConfig) -> bool:
    """Return whether recordings are changed before the spectrogram, so that it must be computed each time."""
    return config.speed_change > 0.0 or config.noise_db is not None


def perturbed(wave: np.ndarray, config: TranscribeConfig, draw: np.random.Generator) -> np.ndarray:
    """Return a waveform fp32 [L], changed in speed and with noise, as the config says."""
    if config.speed_change > 0.0:
        speed = 1.0 + config.speed_change * (int(draw.integers(3)) - 1)
        wave = resampled(wave, speed, 1.0)
    if config.noise_db is not None:
        ratio = 10.0 ** (-draw.uniform(config.noise_db, config.noise_db + NOISE_RANGE_DB) / 20.0)
        loudness = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
        wave = wave + (ratio * loudness) * draw.standard_normal(len(wave), dtype=np.float32)
    return wave.astype(np.float32, copy=False)


NOISE_RANGE_DB = 30.0
"""The range of the drawn noise, from the loudest to the faintest, in dB."""


def masked(features: Tensor, config: TranscribeConfig, draw: np.random.Generator) -> Tensor:
    """Return features fp32 [F, M] with bands of time and frequency hidden: set to 0, which is their mean."""
    frames, bins = features.shape
    if not config.num_time_masks and not config.num_frequency_masks:
        return features
    features = features.clone()
    for _ in range(config.num_frequency_masks):
        start, stop = _band(bins, config.max_frequency_mask, draw)
        features[:, start:stop] = 0.0
    for _ in range(config.num_time_masks):
        start, stop = _band(frames, config.max_time_mask, draw)
        features[start:stop] = 0.0
    return features


def _band(length: int, share: float, draw: np.random.Generator) -> tuple[int, int]:
    """Return a band of up to `share` of a length, its width and then its place drawn uniformly (section 2 of the
    article).
    """
    width = int(draw.integers(int(share * length) + 1))
    start = int(draw.integers(length - width + 1))
    return start, start + width


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
        per_column = frames_per_column(self.model)
        columns = -(-max(map(len, parts)) // per_column)
        frames = per_column * padded_length(columns, self.model.max_sequence_length)
        features = torch.zeros(len(parts), frames, parts[0].shape[1])
        for row, part in zip(features, parts, strict=True):
            row[: len(part)] = part
        lengths = torch.tensor([len(part) for part in parts])
        return (features.pin_memory(), lengths.pin_memory()) if torch.cuda.is_available() else (features, lengths)
