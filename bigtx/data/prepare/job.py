"""`bigtx data prepare`: raw text -> a folder of tokenized, shuffled, checked shards.

    files ──encode──▶ sorted chunks ──assemble──▶ documents in shuffled order ──▶ train/       shards and manifest
            (processes)                              by hash of the text      └──▶ validation/

Everything is made in `<output>.partial`, and the corpus in it is renamed to `<output>` at the end: an existing folder
is complete. A job that ends early, for any reason, continues from there when the same command is run again. The bytes
depend on the input, the tokenizer and the settings only: not on the number of processes, on where a job was
killed, or on the number of machines that share the work:

    bigtx data prepare ... part=1/3      each tokenizes its share of the units
    bigtx data prepare ... part=2/3
    bigtx data prepare ... part=3/3
    bigtx data merge OUTPUT                one machine makes the corpus from the parts
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtx.config.load import to_yaml
from bigtx.config.schema import PrepareConfig
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.corpus.shards import token_dtype
from bigtx.data.prepare.assemble import Assembly
from bigtx.data.prepare.encode import (
    EncodeJob,
    Removed,
    Unit,
    UnitResult,
    encode_unit,
    load_whole,
    make_units,
    set_up,
    signatures_path,
)
from bigtx.data.prepare.recipe import (
    CONFIG_NAME,
    RECIPE_NAME,
    check_existing,
    common_recipe,
    count_parts,
    describe_inputs,
    is_done,
    make_recipe,
    part_folder,
    partial_folder,
    unit_settings_digest,
)
from bigtx.data.raw.documents import Rejects
from bigtx.data.raw.files import list_files
from bigtx.data.storage.access import InputFile
from bigtx.data.text.decontaminate import build_contamination_index, contamination_digest
from bigtx.data.text.near import SignaturePart, find_near_duplicates
from bigtx.data.text.rules import Needs, check_rules, most_for_a_text
from bigtx.data.workers import Workers
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError
from bigtx.utils.files import publish, write_atomic, write_json
from bigtx.utils.hardware import num_cores
from bigtx.utils.log import ProgressLine
from bigtx.utils.units import clock, format_count, format_size

REJECTS_NAME = "rejects.jsonl"
REPORT_NAME = "report.json"

_BUFFERS_OF_A_PROCESS = 8
"""Copies of its buffer that a process holds at most: gathered, joined, sorted, and the texts themselves."""
_BUFFER_BYTES = (1 << 20, 48 << 20)


def buffer_bytes(memory: int, processes: int) -> int:
    """Return the size of each process's buffer: its share of `memory`, between a smallest and a largest size."""
    smallest, largest = _BUFFER_BYTES
    return min(max(memory // (processes * _BUFFERS_OF_A_PROCESS), smallest), largest)


@dataclass
class Report:
    """The result of `prepare` or `merge`.

    Attributes:
        validation: None if nothing is held out.
        num_read: documents that could be read.
        rejects: documents that were left out because they cannot be read, or are empty.
        removed: documents left out by a rule or as duplicates, by the name of the rule.
        passed_over: numbers of files and archive members that were not read because of their suffix, by suffix.
        reused: the corpus existed already, made by the same recipe; the counts of this job are then 0.
    """

    output: Path
    train: Manifest
    validation: Manifest | None
    num_read: int = 0
    rejects: Rejects = field(default_factory=lambda: Rejects(1.0))
    removed: dict[str, Removed] = field(default_factory=dict)
    seconds: float = 0.0
    passed_over: Counter[str] = field(default_factory=Counter)
    reused: bool = False

    @property
    def splits(self) -> list[Manifest]:
        """Return the splits that exist."""
        return [self.train] if self.validation is None else [self.train, self.validation]


@dataclass(frozen=True)
class PartReport:
    """The result of `prepare` with a part: units of the whole input and of this part, and the part's tokens."""

    output: Path
    part: tuple[int, int]
    num_units: int
    num_own_units: int
    num_tokens: int
    missing_parts: list[int]


def prepare(config: PrepareConfig, part: tuple[int, int] = (1, 1)) -> Report | PartReport:
    """Tokenize, shuffle and store a corpus; an existing one with the same recipe is not changed.

    Args:
        part: (i, n): tokenize only the i-th of n shares of the input; `merge` makes the corpus.

    Raises:
        DataError: there is nothing to read, there are too many rejects, or the output is something else or not
            writable.
    """
    begin = time.monotonic()
    output = Path(os.path.abspath(config.output))
    tokenizer = Tokenizer.load(config.tokenizer)
    check_rules(config)
    passed_over: Counter[str] = Counter()
    files = list_files(config.input, passed_over)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        with tempfile.TemporaryDirectory() as scratch:
            check_existing(output, _recipe(config, tokenizer, files, Path(scratch))[0])
        _check_memory(output, config.memory)
        shutil.rmtree(partial_folder(output), ignore_errors=True)  # The job was killed between the two last steps.
        return Report(output, *_open_splits(output), passed_over=passed_over, reused=True)
    with part_folder(output, part) as folder:
        (folder / RECIPE_NAME).unlink(missing_ok=True)  # It is written again when every unit matches it.
        recipe, contamination = _recipe(config, tokenizer, files, folder)
        with _Job(output, config, recipe, contamination) as job:
            tokenizer.save(job.tokenizer)
            num_units, results = job.encode(files, part)
            if part == (1, 1):
                report = job.assemble(results)
                report.seconds = time.monotonic() - begin
                report.passed_over += passed_over
                return report
        write_atomic(folder / CONFIG_NAME, to_yaml(config))
        write_json(folder / RECIPE_NAME, recipe | {"num_units": num_units})
        missing = [number for number in range(1, part[1] + 1) if not is_done(output, (number, part[1]))]
        return PartReport(output, part, num_units, len(results), sum(result.num_tokens for result in results), missing)


def _recipe(
    config: PrepareConfig, tokenizer: Tokenizer, files: list[InputFile], folder: Path
) -> tuple[dict[str, Any], Path | None]:
    """Return the recipe of a corpus, and the index of the evaluation sets' n-grams, written into the folder."""
    index = build_contamination_index(config.decontaminate, folder) if config.decontaminate.paths else None
    recipe = make_recipe(config, tokenizer, files, contamination_digest(index) if index else None)
    return recipe | {"inputs": describe_inputs(files)}, index


def merge(output: str, num_processes: int = 0) -> Report:
    """Make the corpus from all parts of a preparation.

    Raises:
        DataError: a part is missing, or the parts were made from different inputs or settings.
    """
    begin = time.monotonic()
    target = Path(os.path.abspath(output))
    if target.exists() and not partial_folder(target).exists():
        raise DataError(f"{target} exists already, but {partial_folder(target)} with parts to merge does not.")
    num_parts = count_parts(target)
    recipe, config = common_recipe(target, num_parts)
    num_units = recipe.pop("num_units")
    config.output, config.num_processes = str(target), num_processes
    with part_folder(target, (0, num_parts)), _Job(target, config, recipe, None) as job:
        results = job.load(num_units)
        lost = [number for number, result in enumerate(results) if result is None]
        if lost:
            parts = sorted({number % num_parts + 1 for number in lost})
            raise DataError(
                f"{job.work} lacks {len(lost):,} of {num_units:,} units, or they are damaged; "
                "run `bigtx data prepare` again with " + ", ".join(f"part={number}/{num_parts}" for number in parts)
            )
        report = job.assemble([result for result in results if result])
    report.seconds = time.monotonic() - begin
    return report


class _Job:
    """One process's work on a corpus: its folders, its worker processes and its progress line."""

    def __init__(self, output: Path, config: PrepareConfig, recipe: dict[str, Any], contamination: Path | None) -> None:
        self._output, self._config, self._recipe = output, config, recipe
        self._partial = partial_folder(output)
        self.work = self._partial / "work"
        self.work.mkdir(exist_ok=True)
        self.tokenizer = self._partial / "tokenizer"
        processes = config.num_processes or num_cores()
        self._buffer = buffer_bytes(config.memory, processes)
        self._line = ProgressLine()
        self._stored = self._done = 0
        self._tokenizing_since: float | None = None
        digest = unit_settings_digest(recipe)
        encode = EncodeJob(config, processes, self.work, self.tokenizer, contamination, digest, self._buffer)
        self._workers = Workers(processes, functools.partial(set_up, encode), self._show_tokenizing)

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *error: Any) -> None:
        self._line.clear()
        self._workers.__exit__(*error)

    def encode(self, files: list[InputFile], part: tuple[int, int]) -> tuple[int, list[UnitResult]]:
        """Tokenize a share of all units; return the number of all units, and this share's results."""
        self._tokenizing_since, self._stored = time.monotonic(), sum(file.size for file in files) // part[1]
        num_units = 0

        def own_units() -> Iterator[Unit]:
            nonlocal num_units
            for unit in make_units(files, self._config.input):
                num_units += 1
                if unit.number % part[1] == part[0] - 1:
                    yield unit

        results = []
        for result in self._workers.map(encode_unit, own_units()):
            self._done += result.size
            results.append(result)
        self._tokenizing_since = None
        self._line.clear()
        return num_units, results

    def load(self, num_units: int) -> list[UnitResult | None]:
        """Return the results of all units from the parts; None where one is missing or damaged."""
        dtype = token_dtype(Tokenizer.load(self.tokenizer).vocab_size)
        return list(self._workers.map(functools.partial(load_whole, self.work, dtype), range(num_units)))

    def assemble(self, results: list[UnitResult]) -> Report:
        """Make the corpus from all units' results, and rename it to the output."""
        removed: dict[str, Removed] = {}
        needs = Needs()
        for result in results:
            needs.add(result.needs)
            for rule, what in result.removed.items():
                removed.setdefault(rule, Removed()).add(what)
        if not needs.agree:
            raise DataError(
                f"The parts of {self._output} were made with different `memory`: one keeps documents that are too "
                "long for another. Run all of them again with the same memory=; unaffected units are not done again."
            )
        corpus = self._partial / "corpus"
        corpus.mkdir(exist_ok=True)
        rejects = self._list_rejects(results, corpus)
        tokenizer = Tokenizer.load(self.tokenizer)
        tokenizer.save(corpus / "tokenizer")
        assembly = Assembly(self.work, corpus, self._config, self._workers, self._line.show)
        recipe = {name: value for name, value in self._recipe.items() if name != "inputs"}
        total = assembly.run(results, tokenizer, recipe, self._near_duplicates(results), self._buffer)
        self._line.clear()
        removed |= {rule: Removed(number) for rule, number in total.removed.items() if number}
        num_kept = int(total.sums[:, 0].sum())
        if num_kept == 0:
            named = ", ".join(f"{what.documents:,} by {rule}" for rule, what in removed.items())
            raise DataError(f"No document is left: {named} were removed. Relax those rules, or add more text.")
        num_read = sum(result.num_read for result in results)
        content = {
            "documents_read": num_read,
            "rejected": rejects.count,
            "cut_or_damaged_files": rejects.num_cut,
            "empty": rejects.num_empty,
            "removed": {rule: asdict(what) for rule, what in removed.items()},
            "kept": num_kept,
            "memory": asdict(needs),
        }
        write_json(corpus / REPORT_NAME, content)
        write_json(corpus / RECIPE_NAME, self._recipe)
        self._workers.__exit__()
        publish(corpus, self._output)
        return Report(
            self._output,
            *_open_splits(self._output),
            num_read,
            rejects,
            removed,
            passed_over=sum((Counter(result.passed_over) for result in results), Counter()),
        )

    def _show_tokenizing(self, text_bytes: int, tokens: int) -> None:
        if self._tokenizing_since is None:
            return
        seconds = max(time.monotonic() - self._tokenizing_since, 1e-6)
        share = self._done / max(1, self._stored)
        left = f"{share:.0%}, {clock(seconds / share - seconds)} left, " if share else ""
        speed = f"{text_bytes / seconds / 1e6:.1f} MB/s, {format_count(tokens / seconds)} tokens/s"
        self._line.show(f"tokenizing: {left}{format_count(tokens)} tokens, {speed}", share)

    def _list_rejects(self, results: list[UnitResult], corpus: Path) -> Rejects:
        """Check the rejects; if they are refused, keep the list next to the output."""
        path = corpus / REJECTS_NAME
        with open(path, "w", encoding="utf-8") as listed:
            rejects = Rejects(
                self._config.input.max_rejects, lambda reject: print(json.dumps(asdict(reject)), file=listed)
            )
            for result in results:
                for reject in result.rejects:
                    rejects.add(reject)
        try:
            rejects.check(sum(result.num_read for result in results), self._recipe["num_files"])
        except DataError as error:
            if not rejects:
                raise
            kept = self._output.with_name(f"{self._output.name}.{REJECTS_NAME}")
            shutil.move(path, kept)
            raise DataError(f"{error}\nAll of them are listed in {kept}.") from None
        return rejects

    def _near_duplicates(self, results: list[UnitResult]) -> Path | None:
        """Return the file that marks the near duplicates among the documents, if they are to be removed."""
        if not self._config.near_duplicates.enabled:
            return None
        self._line.show("searching for near duplicates")
        parts = [SignaturePart(signatures_path(self.work, result.number), result.num_documents) for result in results]
        return find_near_duplicates(parts, self.work, self._config.near_duplicates, self._config.memory) / "removed"


def _check_memory(output: Path, memory: int) -> None:
    """Accept a corpus of the same recipe if the same documents are too long with this `memory`.

    Raises:
        DataError: other documents are too long.
    """
    needs = Needs(**json.loads((output / REPORT_NAME).read_bytes()).get("memory", {}))
    if not needs.allows(memory):
        kept = "fewer" if needs.kept > most_for_a_text(memory) else "more"
        raise DataError(
            f"{output} is a corpus already, but with memory={format_size(memory)} {kept} of its long documents would "
            f"be kept. Set memory={needs.memory_mib()}MiB, which leaves it unchanged, choose another `output`, or "
            "remove the folder if it is not needed."
        )


def _open_splits(output: Path) -> tuple[Manifest, Manifest | None]:
    validation = output / "validation"
    return Manifest.load(output / "train"), Manifest.load(validation) if validation.is_dir() else None
