"""Every setting of a run, with its type, meaning, unit and default, and every rule between settings.

A field's docstring line is its documentation: `bigtx configs explain KEY` prints it, and so do config errors. A rule is
in `problems()` of the section that it belongs to, and is checked when a config is loaded; so `--print-config`,
`--dry-run` and the run refuse the same configs. Resume compares configs field by field; `change` says which changes it
allows (see settings.py). OmegaConf reads the annotations at run time and knows Optional, not `X | None`.
"""

from __future__ import annotations

from bigtx.config.schema.finetuning import FieldsConfig as FieldsConfig
from bigtx.config.schema.finetuning import FinetuneConfig as FinetuneConfig
from bigtx.config.schema.finetuning import FinetuneTrainConfig as FinetuneTrainConfig
from bigtx.config.schema.finetuning import RecordsConfig as RecordsConfig
from bigtx.config.schema.finetuning import SelectionConfig as SelectionConfig
from bigtx.config.schema.model import AudioConfig as AudioConfig
from bigtx.config.schema.model import ExpertsConfig as ExpertsConfig
from bigtx.config.schema.model import LoraConfig as LoraConfig
from bigtx.config.schema.model import ModelConfig as ModelConfig
from bigtx.config.schema.model import RopeScalingConfig as RopeScalingConfig
from bigtx.config.schema.preparation import CleanConfig as CleanConfig
from bigtx.config.schema.preparation import DecontaminateConfig as DecontaminateConfig
from bigtx.config.schema.preparation import FilterConfig as FilterConfig
from bigtx.config.schema.preparation import InputConfig as InputConfig
from bigtx.config.schema.preparation import NearDuplicateConfig as NearDuplicateConfig
from bigtx.config.schema.preparation import PrepareConfig as PrepareConfig
from bigtx.config.schema.preparation import TokenizerTrainConfig as TokenizerTrainConfig
from bigtx.config.schema.pretraining import DataConfig as DataConfig
from bigtx.config.schema.pretraining import ForeignConfig as ForeignConfig
from bigtx.config.schema.pretraining import ObjectiveConfig as ObjectiveConfig
from bigtx.config.schema.pretraining import PhaseConfig as PhaseConfig
from bigtx.config.schema.pretraining import PretrainConfig as PretrainConfig
from bigtx.config.schema.pretraining import SourceConfig as SourceConfig
from bigtx.config.schema.pretraining import TrainConfig as TrainConfig
from bigtx.config.schema.pretraining import ValidationConfig as ValidationConfig
from bigtx.config.schema.tasks import ChatConfig as ChatConfig
from bigtx.config.schema.tasks import ClassifyConfig as ClassifyConfig
from bigtx.config.schema.tasks import PreferenceConfig as PreferenceConfig
from bigtx.config.schema.tasks import SftConfig as SftConfig
from bigtx.config.schema.tasks import TranscribeConfig as TranscribeConfig
from bigtx.config.schema.tasks import TranslateConfig as TranslateConfig
from bigtx.config.schema.training import DistillConfig as DistillConfig
from bigtx.config.schema.training import EngineConfig as EngineConfig
from bigtx.config.schema.training import GuardsConfig as GuardsConfig
from bigtx.config.schema.training import OptimizerConfig as OptimizerConfig
from bigtx.config.schema.training import RhythmConfig as RhythmConfig
from bigtx.config.schema.training import RunConfig as RunConfig
from bigtx.config.schema.training import ScheduleConfig as ScheduleConfig
from bigtx.config.schema.training import TrackConfig as TrackConfig
