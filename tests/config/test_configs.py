"""Every YAML that ships."""

from __future__ import annotations

import pytest

from bigtx.config.load import base_files, load
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.shipped import shipped_configs, shipped_folder
from bigtx.utils.errors import ConfigError

SCHEMAS: dict[str, tuple[type, ...]] = {
    "model": (PretrainConfig,),
    "pretrain": (PretrainConfig,),
    "finetune": (FinetuneConfig,),
    "data": (PrepareConfig, TokenizerTrainConfig),
}


@pytest.mark.parametrize("name", shipped_configs())
def test_it_loads(name: str) -> None:
    refusals = []
    for schema in SCHEMAS[name.partition("/")[0]]:
        try:
            load(schema, [name], check=False)
        except ConfigError as error:
            refusals.append(f"{schema.__name__}: {error}")
        else:
            return
    pytest.fail("\n".join(refusals))


@pytest.mark.parametrize("name", shipped_configs())
def test_it_fits_together(name: str) -> None:
    """Apart from folders that only its user has."""
    if name.startswith("data/"):
        return
    try:
        load(SCHEMAS[name.partition("/")[0]][0], [name])
    except ConfigError as error:
        theirs = ("no such folder", "is empty", "is not given", "no such file", "holds no", "problems in the")
        assert all(any(words in line for words in theirs) for line in str(error).splitlines()), str(error)


@pytest.mark.parametrize("name", shipped_configs())
def test_it_says_what_it_is_and_builds_on_recipes_alone(name: str) -> None:
    root = shipped_folder().resolve()
    assert (root / name).read_text(encoding="utf-8").startswith("# "), "the first line is shown by `bigtx configs list`"
    assert all(path.is_relative_to(root) for path in base_files(root / name))
