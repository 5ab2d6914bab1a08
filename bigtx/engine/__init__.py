"""The only package that uses DeepSpeed.

    config ──▶ deepspeed_config ──▶ Engine (engine.py) ── train_step, evaluate
                                      │
    optimizers, muon ─────────────────┤
    trainable: what stays frozen ─────┤
                                      ▼
                fragments: what this rank holds of each parameter
                                      │
                                      ▼
        saving ──▶ checkpoint: safetensors fragments and a manifest, readable without DeepSpeed
                              └── MergedCheckpoint: the same with adapters added to their matrices

Nothing outside this package imports deepspeed.
"""
