"""DeepSpeed, held in one place.

    config ──▶ deepspeed_config ──▶ Engine (engine.py) ── train_step, evaluate
                                      │
    optimizers, muon, schedules ──────┤
                                      ▼
                fragments: what this rank holds of each parameter
                                      │
                                      ▼
           checkpoint: safetensors fragments and a manifest, readable without DeepSpeed

Nothing outside this package imports deepspeed.
"""
