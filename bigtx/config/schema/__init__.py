"""Every setting of a run, with its type, meaning, unit and default, and every rule between settings.

A field's docstring line is its documentation: `bigtx configs explain KEY` prints it, and so do config errors. A rule is
in `problems()` of the section that it belongs to, and is checked when a config is loaded; so `--print-config`,
`--dry-run` and the run refuse the same configs. Resume compares configs field by field; `change` says which changes it
allows (see settings.py). OmegaConf reads the annotations at run time and knows Optional, not `X | None`.
"""

from __future__ import annotations

from bigtx.config.schema.finetuning import (
    FieldsConfig,
    FinetuneConfig,
    FinetuneTrainConfig,
    RecordsConfig,
    SelectionConfig,
)
from bigtx.config.schema.model import (
    AudioConfig,
    ExpertsConfig,
    LoraConfig,
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
from bigtx.config.schema.pretraining import (
    DataConfig,
    ForeignConfig,
    ObjectiveConfig,
    PhaseConfig,
    PretrainConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)
from bigtx.config.schema.tasks import (
    ChatConfig,
    ClassifyConfig,
    PreferenceConfig,
    SftConfig,
    TranscribeConfig,
    TranslateConfig,
)
from bigtx.config.schema.training import (
    DistillConfig,
    EngineConfig,
    OptimizerConfig,
    RhythmConfig,
    RunConfig,
    ScheduleConfig,
    TrackConfig,
)

__all__ = [
    "AudioConfig",
    "ChatConfig",
    "ClassifyConfig",
    "CleanConfig",
    "DataConfig",
    "DecontaminateConfig",
    "DistillConfig",
    "EngineConfig",
    "ExpertsConfig",
    "FieldsConfig",
    "FilterConfig",
    "FinetuneConfig",
    "FinetuneTrainConfig",
    "ForeignConfig",
    "InputConfig",
    "LoraConfig",
    "ModelConfig",
    "NearDuplicateConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PreferenceConfig",
    "PrepareConfig",
    "PretrainConfig",
    "RecordsConfig",
    "RhythmConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "SftConfig",
    "SourceConfig",
    "TokenizerTrainConfig",
    "TrackConfig",
    "TrainConfig",
    "TranscribeConfig",
    "TranslateConfig",
    "ValidationConfig",
]
