"""`bigtx evaluate`: measure a run on held-out data; print a table, write a JSON file, and log to a W&B run of its own.

    a fine-tuned run     its task's metrics, on the records of files or of one of its own splits
    a pretrained run     loss, perplexity and bits per byte, on the validation split of prepared corpora

The command uses one process on one device. The W&B run is new and has the job type `evaluate`, because W&B accepts no
steps after the last one of a finished run. Its config names the run and the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtx.commands.measure import Corpora, Records, what_is_measured
from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from bigtx.engine.trained import find
from bigtx.track.jsonl import plain
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError, LaunchError, writes
from bigtx.utils.files import read_object, write_json
from bigtx.utils.log import said_aside, say_json
from bigtx.utils.options import add_loading_options, add_predicting_options, check_options
from bigtx.utils.terminal import table, visible

FOLDER = "evaluations"
"""The folder of the outputs in the run folder, if no other output is named."""
MAX_COLUMNS = 12
"""Wider tables are not printed; they are only in the JSON file."""


def command(argv: Sequence[str]) -> int:
    """Run `bigtx evaluate`.

    Returns:
        The exit status: 1 if some records could not be used.

    Raises:
        BigtxError: the run or the data cannot be used.
    """
    arguments = _parser().parse_args(argv)
    check_options({"batch_size": arguments.batch_size})
    if arguments.output is not None and not arguments.output.endswith(".json"):
        raise ConfigError(f"output={arguments.output}: the output is a JSON file; write output=NAME.json")
    checkpoint, config = find(arguments.run)
    if not arguments.data and not arguments.split:
        arguments.split = "validation"
        kind = "records" if isinstance(config, FinetuneConfig) else "text"
        print(f"measured on the run's own validation {kind}, because no data=FILE is named", file=sys.stderr)
    if arguments.output is not None:
        _refuse_other_file(Path(arguments.output), arguments, checkpoint)
    found: Records | Corpora
    if isinstance(config, FinetuneConfig):
        found = Records(arguments, checkpoint, config)
    else:
        assert isinstance(config, PretrainConfig)
        found = Corpora(arguments, checkpoint, config)
    result = found.measure()
    output = _output_path(arguments, checkpoint, result)
    with writes(output, "; write output=FILE.json to name another file"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, plain(result))
    with said_aside(arguments.json):
        print(_shown(result))
        print(f"written to {output}")
        _track(arguments, config, result, output, found.examples)
    if arguments.json:
        say_json(plain(result) | {"output": str(output)})
    return found.status


def _parser() -> Arguments:
    parser = Arguments(
        "evaluate",
        "Measure a run on held-out data: a fine-tuned run by the metrics of its task, on records with "
        "answers (the exit status is 1 if some of them cannot be used); a pretrained run by its loss, on the "
        "validation split of prepared corpora.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        help="records (.jsonl, .csv, .tsv, .tar, folders, globs); for a pretrained run, folders of prepared corpora",
    )
    data.add_argument("--split", choices=["validation", "test"], help="held-out data of the run itself (validation)")
    parser.add_argument("--output", metavar="FILE.json", help=f"the file to write (RUN/{FOLDER}/NAME.json)")
    add_predicting_options(parser)
    add_loading_options(parser)
    parser.add_argument(
        "--wandb",
        choices=["auto", "online", "offline", "off"],
        help="mode of W&B for this evaluation (that of the run)",
    )
    return parser


def _output_path(arguments: argparse.Namespace, checkpoint: Path, result: Mapping[str, Any]) -> Path:
    """Return the file to write: the named one, or one that no other evaluation has."""
    if arguments.output:
        return Path(arguments.output)
    name = arguments.split or Path(arguments.data[0]).name.partition(".")[0] or "data"
    folder = run_dir_of(checkpoint) / FOLDER
    for number in range(1, 10_000):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        if not path.exists() or _same(path, result):
            return path
    raise LaunchError(f"{folder} has too many evaluations called {name}; name a file: output=FILE.json")


def _refuse_other_file(output: Path, arguments: argparse.Namespace, checkpoint: Path) -> None:
    """Check before the work begins that an existing output is the same evaluation, which may be overwritten.

    Raises:
        ConfigError: the file is not an evaluation, or another one.
    """
    if not output.exists():
        return
    from bigtx.engine.checkpoint import Checkpoint

    before = read_object(output)
    if not before.keys() >= {"checkpoint", "manifest_sha256", "metrics"}:
        what = f"output={output} exists and is not an evaluation; write output=FILE.json to name another file"
        raise ConfigError(what)
    now = what_is_measured(arguments) | {"manifest_sha256": Checkpoint(checkpoint).manifest_sha256}
    if any(before.get(key) != value for key, value in now.items()):
        raise ConfigError(
            f"output={output} is another evaluation, of {before['checkpoint']}; write output=FILE.json to name another "
            "file, or delete that one"
        )


def _same(path: Path, result: Mapping[str, Any]) -> bool:
    """Return whether a file is the evaluation of the same weights on the same data in the same way."""
    before = read_object(path)
    keys = ("manifest_sha256", "weights", "data", "records_sha256", "rows", "set")
    return all(before.get(key) == result.get(key) for key in keys)


def _shown(result: Mapping[str, Any]) -> str:
    """Format the metrics, and the tables that are not too wide, for the terminal."""
    lines = [f"{result['checkpoint']}, step {result['step']:,}, {result['weights']} weights"]
    if "records" in result:
        cut = f", {result['num_cut']:,} of them cut to the model's length" if result["num_cut"] else ""
        lines.append(f"{result['records']:,} records{cut}")
    width = max(map(len, result["metrics"]))
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in result["metrics"].items()]
    for name, rows in result.get("tables", {}).items():
        if rows and len(rows[0]) <= MAX_COLUMNS:
            cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
            lines += [f"{name}:", *(f"  {line}" for line in table(cells))]
    return "\n".join(map(visible, lines))


def _track(
    arguments: argparse.Namespace,
    config: RunConfig,
    result: Mapping[str, Any],
    output: Path,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Log the metrics to W&B, unless that is off.

    Raises:
        LaunchError: the folder of the W&B run cannot be written.
    """
    from bigtx.track.tracker import Tracker
    from bigtx.train.run_folder import dump
    from bigtx.utils import hardware

    track = dataclasses.replace(config.track, wandb=arguments.wandb or config.track.wandb)
    if track.wandb == "off":
        return
    folder = output.with_suffix(".wandb")
    with writes(f"the W&B run in {folder}", "; write output=FILE.json to name another file, or wandb=off"):
        folder.mkdir(exist_ok=True)
    facts = {key: value for key, value in result.items() if key not in ("metrics", "tables")}
    checkpoint = Path(result["checkpoint"])
    tracker = Tracker(
        folder,
        track,
        run_config={**dump(config), "evaluation": facts},
        environment=hardware.describe(),
        rank=0,
        total_steps=0,
        better={},
        name=f"{run_dir_of(checkpoint).name} {output.stem}",
        job_type="evaluate",
        base={"checkpoint": str(checkpoint)}
        | {key: result[key] for key in ("manifest_sha256", "wandb_run_id", "step")},
        stream=sys.stdout,
    )
    step, tokens = result["step"], result["tokens"]
    tracker.log(step, tokens, {f"evaluate/{name}": value for name, value in result["metrics"].items()})
    tracker.predictions(step, tokens, examples)
    tracker.close("finished", step)
