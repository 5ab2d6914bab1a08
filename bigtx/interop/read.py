"""A folder in Hugging Face's layout: config.json and safetensors, in one file or in shards with an index.

Nothing in it is executed: no pickle is opened and no code is imported, even if config.json names some.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bigtx.interop.classes import AUTO_CLASS
from bigtx.utils.errors import CheckpointError, ConfigError
from bigtx.utils.files import json_value
from bigtx.utils.shell import command
from bigtx.utils.units import format_names

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": AUTO_CLASS}
"""Classes of transformers by PEFT's name for their models; PEFT has none for masked language models."""
_BESIDE_WEIGHTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""Kinds of PEFT's adapters that do not change weights, so that they cannot be merged into them."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "BF16", "F16")
MAPPED_BYTES = 64 * 2**20
"""The number of bytes that are read of a file before it is opened again."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder, if bigtx can read such a model.

    Raises:
        ConfigError: the folder or file is missing, or has adapters, a quantized model or a model with its own code.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a folder. Weights are not downloaded by bigtx: fetch them first, e.g. with "
            f"`{command('hf', 'download', 'OWNER/NAME', '--local-dir', folder)}`"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise _adapters(folder)
    values = _read_json(folder / CONFIG)
    if "auto_map" in values:
        code = ", ".join(map(str, values["auto_map"]))
        what = f"{folder / CONFIG} names its own code (auto_map: {code}), which bigtx never runs"
        raise ConfigError(f"{what}; only models of transformers' own classes can be imported")
    if values.get("quantization_config"):
        what = f"{folder / CONFIG} has a quantization_config: its weights are quantized; import the original instead"
        raise ConfigError(what)
    if not isinstance(values.get("model_type"), str):
        raise ConfigError(f"{folder / CONFIG} names no model_type; is it the config.json of a transformers model?")
    return values


def _adapters(folder: Path) -> ConfigError:
    """Return the error with advice for a folder of adapters; transformers would load its base and add the adapters to
    it.
    """
    values = _read_json(folder / ADAPTER_CONFIG)
    kind, base = str(values.get("peft_type")), str(values.get("base_model_name_or_path") or "BASE")
    problem = f"{folder} has adapters for another model in PEFT's format ({kind[:40]}), not a model"
    if kind in _BESIDE_WEIGHTS:
        return ConfigError(f"{problem}; adapters of this kind cannot be merged into a model; import the base {base!r}")
    auto_class = AUTO_CLASSES.get(str(values.get("task_type")), "AutoModelForMaskedLM")
    return ConfigError(
        f"{problem}; merge them into their base {base!r} and import the result. In Python: "
        "import peft, transformers as t; "
        f"peft.PeftModel.from_pretrained(t.{auto_class}.from_pretrained({base!r}), {str(folder)!r})"
        ".merge_and_unload().save_pretrained('MERGED'); "
        f"t.AutoTokenizer.from_pretrained({base!r}).save_pretrained('MERGED')"
    )


def read_end_ids(folder: Path, values: dict[str, Any]) -> list[int]:
    """Return the ids that end a text in generation, by generation_config.json and config.json: one each, or several.

    Args:
        values: the content of config.json.

    Raises:
        ConfigError: generation_config.json cannot be read.
    """
    path = folder / GENERATION_CONFIG
    found = [source.get("eos_token_id") for source in (_read_json(path) if path.is_file() else {}, values)]
    ids = [i for named in found for i in (named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} has no {path.name}; name the folder of a Hugging Face model, with its {CONFIG} and weights"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object; copy it again from its source")
    return values


class ForeignWeights:
    """The tensors of a folder; their headers have been read and checked, but not their content.

    Attributes:
        shapes: the shape of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        CheckpointError: there are no safetensors, a file is missing or damaged, or the index does not fit the files.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        self._num_read = 0
        index = self._read_index()
        for name in sorted(set(index.values())) if index else [SINGLE]:
            self._read_header(name)
        if wrong := sorted(key for key, name in index.items() if self._files.get(key) != name):
            what = f"{folder / INDEX} does not fit the files: {format_names(wrong)} not in the shard that it names"
            raise CheckpointError(f"{what}; copy the folder again")

    @property
    def num_files(self) -> int:
        """Return the number of safetensors files that hold the tensors."""
        return len(set(self._files.values()))

    def check_kinds(self, keys: Iterable[str]) -> None:
        """Check that tensors are floating-point numbers.

        Raises:
            CheckpointError: some are integers or have 8 bits, so the checkpoint is quantized.
        """
        wrong = [f"{key} ({self._dtypes[key]})" for key in keys if self._dtypes[key] not in _FLOATS]
        if wrong:
            what = f"{self.folder} has tensors that are not fp64, fp32, bf16 or fp16: {format_names(wrong)}"
            raise CheckpointError(f"{what}; is it quantized? import the original weights")

    def read(self, key: str) -> Tensor:
        """Return a whole tensor in fp32.

        Raises:
            CheckpointError: its file cannot be read.
        """
        file = self._files[key]
        try:
            # The pages that were read of a mapped file count as memory until it is closed.
            if self._open is None or self._open[0] != file or self._num_read > MAPPED_BYTES:
                self._open, self._num_read = None, 0
                self._open = file, safe_open(self.folder / file, framework="pt")
            tensor: Tensor = self._open[1].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from error
        self._num_read += tensor.nbytes
        import torch  # Errors about the folder appear before it is imported.

        return tensor.to(torch.float32, copy=True)

    def close(self) -> None:
        """Close the files."""
        self._open = None

    def _read_index(self) -> dict[str, str]:
        """Return the file of each key, or nothing if one file has all."""
        if (self.folder / SINGLE).is_file():
            return {}
        if not (self.folder / INDEX).is_file():
            raise _no_weights(self.folder)
        index = _read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()) or not index:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map; copy it again from its source")
        if outside := sorted({name for name in index.values() if Path(name).name != name}):
            raise CheckpointError(f"{self.folder / INDEX} names files outside of its folder: {format_names(outside)}")
        if missing := sorted({name for name in index.values() if not (self.folder / name).is_file()}):
            what = f"{self.folder} lacks {format_names(missing)}, which {INDEX} names; fetch the missing shards"
            raise CheckpointError(what)
        return index

    def _read_header(self, name: str) -> None:
        try:
            # The library refuses a file that is longer or shorter than its header says.
            with safe_open(self.folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a file, not a dict
                    part = file.get_slice(key)
                    self.shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
                    self._files[key] = name
        except (SafetensorError, OSError) as error:
            what = f"{self.folder / name} is not a complete safetensors file ({error}); fetch it again"
            raise CheckpointError(what) from error


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return CheckpointError(
            f"{folder} has its weights as pickle only ({format_names(pickles)}), which can run any code when it is "
            f"opened; bigtx never opens one: look for a {SINGLE} of the same model, or convert it where you trust it"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; it has {format_names(others)}, which is not a complete model by its name" if others else ""
    return CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}{found}")


def refuse_differences(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors that a model needs with those of the folder.

    Raises:
        CheckpointError: some are missing, unknown or of another shape; the message names them.
    """
    wrong = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown, so the model computes more than bigtx would": sorted(found.keys() - expected.keys()),
        "of another shape": wrong,
    }
    parts = [f"{len(keys)} {what}: {format_names(keys)}" for what, keys in differences.items() if keys]
    if parts:
        raise CheckpointError(f"{folder} does not have the tensors that its {CONFIG} requires: {'; '.join(parts)}")
