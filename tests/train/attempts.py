"""One start of a run whose data, model, ranks and steps only take note of their calls."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from bigtx.config.schema import PretrainConfig
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.execute import execute


class Attempt:
    """A start of a run, with the real context, folder and end.

    Attributes:
        context: of the run.
        in_data: called where a run opens its data.
        in_loop: called instead of the training loop; returns whether the run is finished.
        at_end: whether the run has nothing left to do.
        speaks: whether this rank is the first to fail.
        changed: settings that differ from the run so far.
    """

    def __init__(self, config: PretrainConfig, told: list[str], *, dry_run: bool = False, **fields: Any) -> None:
        self.context, self.told = RunContext(config, dry_run=dry_run), told
        self.facts = {"tokenizer": "t", "data": "d"}
        self.in_data: Callable[[], None] = lambda: None
        self.in_loop: Callable[[], bool] = lambda: True
        self.at_end, self.speaks = False, True
        self.changed: list[dict[str, Any]] = []
        self.engine: Any = None
        vars(self).update(fields)

    def note(self, text: str) -> Callable[..., None]:
        return lambda *arguments, **facts: self.told.append(" ".join([text, *map(str, arguments)]))

    def run(self) -> int:
        """Do what the function of a kind of run does."""
        with self.context as context:
            context.join_ranks()
            self.in_data()
            config = context.config
            found = start.open_folder(context, config, self.facts)
            if self.at_end:
                context.status = "finished"
                return 0
            self.engine = self._engine()
            if found.checkpoint:
                found.changed.extend(self.changed)
                context.state = start.saved_state(config, found)
                start.load_checkpoint(context, self.engine, found, context.state)
            else:
                context.state = start.first_state(config)
            tracker = SimpleNamespace(lost="", close=self.note("close tracker"), message=self.note("message"))
            context.resources.callback(lambda: tracker.close(context.status, context.state.step))
            run: Any = SimpleNamespace(
                state=context.state,
                tracker=tracker,
                ranks=context.ranks,
                engine=self.engine,
                run_dir=context.folder,
                loader=SimpleNamespace(close=self.note("close loader")),
                in_loop=self.in_loop,
            )
            return execute(context, run, next_command="next", conclude=lambda run: self.told.append("conclude"))

    def ranks(self, timeout_seconds: float) -> Any:
        """Stand for `Ranks`: a single rank."""
        return SimpleNamespace(
            rank=0,
            world_size=1,
            notes_on_devices=list,
            once=lambda action: action(),
            on_first=lambda action: action(),
            from_first=lambda value: value,
            gather=lambda value: [value],
            is_first_to_fail=lambda: self.speaks,
            silent=lambda: [3, 5],
            describe=lambda ranks: [f"rank {rank}" for rank in ranks],
            end_silent=lambda ranks, folder: None,
            barrier=self.note("barrier"),
            close=self.note("leave"),
        )

    def _engine(self) -> Any:
        return SimpleNamespace(
            optimizer=SimpleNamespace(num_updates=0),
            owned=[],
            frozen=[],
            fill=lambda read, states: self.told.append(f"fill from {read} states={states}"),
            set_loss_scale=self.note("loss scale"),
            set_expert_counts=self.note("expert counts"),
        )
