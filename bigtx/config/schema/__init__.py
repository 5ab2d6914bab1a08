"""Every setting of a run, with its type, meaning, unit and default.

A field's docstring line is its documentation: `bigtx configs explain KEY` prints it, and so do config errors.
Resume compares configs field by field; `change` says what it allows (see fields.py). OmegaConf reads the annotations at
run time and knows Optional, not `X | None`.
"""

from __future__ import annotations

from bigtx.config.schema.finetuning import (
    ClassifyConfig,
    FieldsConfig,
    FinetuneConfig,
    FinetuneTrainConfig,
    RecordsConfig,
    SelectionConfig,
)
from bigtx.config.schema.model import (
    ExpertsConfig,
    ModelConfig,
    RopeScalingConfig,
)
from bigtx.config.schema.preparation import (
    CleanConfig,
    DecontaminateConfig,
    FilterConfig,
    InputConfig,
    NearDuplicateConfig,
    PrepareConfig,
    TokenizerTrainConfig,
)
from bigtx.config.schema.training import (
    DataConfig,
    EngineConfig,
    ForeignConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PhaseConfig,
    PretrainConfig,
    RhythmConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrackConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "ClassifyConfig",
    "CleanConfig",
    "DataConfig",
    "DecontaminateConfig",
    "EngineConfig",
    "ExpertsConfig",
    "FieldsConfig",
    "FilterConfig",
    "FinetuneConfig",
    "FinetuneTrainConfig",
    "ForeignConfig",
    "InputConfig",
    "ModelConfig",
    "NearDuplicateConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PrepareConfig",
    "PretrainConfig",
    "RecordsConfig",
    "RhythmConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "SourceConfig",
    "TokenizerTrainConfig",
    "TrackConfig",
    "TrainConfig",
    "ValidationConfig",
]
