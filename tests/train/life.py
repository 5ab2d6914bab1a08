"""A session whose data, model and ranks only take note."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from bigtx.config.schema import PretrainConfig
from bigtx.train.session import Session


class Life(Session[PretrainConfig]):
    """A session whose data, model and steps are what a test says."""

    job_type = "test"

    def __init__(self, config: PretrainConfig, told: list[str], **fields: Any) -> None:
        super().__init__(config, dry_run=fields.pop("dry_run", False))
        self.told, self.facts = told, {"tokenizer": "t", "data": "d"}
        self.in_data: Callable[[], None] = lambda: None
        self.in_loop: Callable[[], bool] = lambda: True
        self.at_end, self.speaks = False, True
        vars(self).update(fields)

    def note(self, text: str, value: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.told.append(" ".join([text, *map(str, arguments)]))
            return value

        return call

    def join_ranks(self) -> None:
        self.ranks = SimpleNamespace(
            rank=0,
            world_size=1,
            on_first=lambda action: action(),
            from_first=lambda value: value,
            gather=lambda value: [value],
            is_first_to_fail=lambda: self.speaks,
            silent=lambda: [3, 5],
            barrier=self.note("barrier"),
            close=self.note("leave"),
        )

    @staticmethod
    def check_inputs(config: Any, num_ranks: int) -> None: ...

    def open_data(self) -> None:
        self.in_data()

    def is_finished(self) -> bool:
        return self.at_end

    def build_engine(self) -> None:
        self.engine = SimpleNamespace(
            optimizer=SimpleNamespace(num_updates=0),
            frozen=[],
            fill=lambda read, states: self.told.append(f"fill from {read} states={states}"),
            set_loss_scale=self.note("loss scale"),
            set_expert_counts=self.note("expert counts"),
        )

    def begin(self) -> None:
        self.told.append("begin")

    def resume(self) -> None:
        self.told.append("resume")

    def _run(self) -> Any:
        self.loader = SimpleNamespace(close=self.note("close loader"))
        self.tracker = SimpleNamespace(close=self.note("close tracker"), message=self.note("message"))
        return self

    def _tell_model(self) -> None:
        self.told.append("name the model")

    def conclude(self, run: Any) -> None:
        self.told.append("conclude")

    def make_loader(self) -> Any: ...
    def make_validation(self) -> Any: ...
    def flops_per_token(self) -> float: ...
    def validate_every(self) -> str: ...
    def next_command(self) -> str:
        return "next"
