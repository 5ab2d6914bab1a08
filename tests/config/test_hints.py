"""Hints name settings of the schema in use, also for the names of other frameworks."""

from __future__ import annotations

import pytest

from bigtx.commands.data import FLAGS
from bigtx.config.load import load, parse_command_line
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import OTHER_NAMES, find, leaves, same_name_keys, similar_keys
from bigtx.utils.errors import ConfigError

SCHEMAS = (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig)
FOREIGN = sorted({name for names in OTHER_NAMES.values() for name in names.split()})


def test_every_setting_with_other_names_exists() -> None:
    for key, names in OTHER_NAMES.items():
        assert any(find(schema, key) for schema in SCHEMAS), key
        assert len(set(names.split())) == len(names.split()), key


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_of_another_framework_leads_to_a_setting_of_this_schema(name: str, schema: type) -> None:
    if find(schema, name):
        return
    meant = [key for key, names in OTHER_NAMES.items() if name in names.split() and find(schema, key)]
    if schema in (PretrainConfig, FinetuneConfig):
        assert meant, f"{name} is known, but not in this schema"
    for section in ("", "train.", "model."):
        key = section + name
        if find(schema, key) or (section and not find(schema, section[:-1])):
            continue
        hints = similar_keys(schema, key)
        assert all(find(schema, hint.replace("NAME", "mine")) for hint in hints), hints
        assert set(meant) <= set(hints), hints
        with pytest.raises(ConfigError) as caught:
            load(schema, [f"{key}=1"], check=False)
        assert all(hint in str(caught.value) for hint in meant), caught.value


@pytest.mark.parametrize(
    ("schema", "name", "key"),
    [
        (PretrainConfig, "block_size", "train.sequence_length"),
        (FinetuneConfig, "block_size", "data.max_length"),
        (FinetuneConfig, "max_seq_length", "data.max_length"),
        (PretrainConfig, "num_train_epochs", "train.max_tokens"),
        (FinetuneConfig, "num_train_epochs", "train.epochs"),
        (FinetuneConfig, "output_dir", "run_dir"),
        (PrepareConfig, "output_dir", "output"),
        (TokenizerTrainConfig, "run_dir", "output"),
    ],
)
def test_a_name_means_one_setting_of_each_schema(schema: type, name: str, key: str) -> None:
    assert same_name_keys(schema, name) == [key]
    with pytest.raises(ConfigError, match=f"did you mean {key}\\?"):
        load(schema, [f"{name}=1"], check=False)
    with pytest.raises(ConfigError, match=f"settings are written KEY=VALUE: {key}=1$"):
        load(schema, [f"--{name}", "1"], check=False)


def test_a_typo_of_a_setting_leads_to_a_setting_of_this_schema() -> None:
    for schema in SCHEMAS:
        for other in SCHEMAS:
            for setting in leaves(other):
                hints = similar_keys(schema, setting.key)
                assert all(find(schema, hint.replace("NAME", "mine")) for hint in hints), (setting.key, hints)


def test_a_switch_of_another_command_is_not_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(PrepareConfig, ["--rank=2"], program="bigtx data prepare", flags=FLAGS)
    assert "--ranks" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean --json"):
        parse_command_line(PrepareConfig, ["--jso"], program="bigtx data prepare", flags=FLAGS)
