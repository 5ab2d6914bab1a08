"""Recordings to what an encoder hears.

wav, flac ──decode──▶ waveform, of the model's rate ──log-mel──▶ features ──SpecAugment──▶ batch
"""
