"""From recordings to the input of an audio encoder.

wav, flac ──decode──▶ waveform, of the model's rate ──log-mel──▶ features ──SpecAugment──▶ batch
"""
