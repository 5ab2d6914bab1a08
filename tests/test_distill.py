"""A teacher and its student through the doors: plain text and records, killed and on two ranks, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doors import TINY, losses, pretrain, same_weights
from finetunes import finetune, finetuned, kill_at, labelled, make_base, results, write_jsonl

import bigtx
from bigtx.config.load import from_dict
from bigtx.config.schema import DistillConfig, FinetuneConfig, ModelConfig
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint, preferred
from bigtx.finetuning.tasks import task_type
from bigtx.model.loss import Loss
from bigtx.model.transformer import Transformer
from bigtx.pretraining.objectives import LikelihoodTask
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.teacher import Distilled

SMALL = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.max_sequence_length=64"]
"""A student from nothing."""


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder that has learned a little."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return make_base(
        corpus,
        folder,
        "model.num_layers=4",
        "optimizer.learning_rate=5e-3",
        "train.checkpoint_every=20 steps",
        steps=30,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of plain text."""
    records = [{"text": record["text"]} for record in labelled(120)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", records)


def student_of(teacher: Path, corpus: Path, run_dir: Path, *changes: str) -> list[str]:
    """Pretraining of a student on a prepared corpus."""
    return [
        *TINY,
        *SMALL,
        "engine.precision=fp32",
        f"data.sources.a.path={corpus}",
        f"distill.teacher={teacher}",
        f"run_dir={run_dir}",
        "train.max_steps=20",
        "track.wandb=off",
        *changes,
    ]


@pytest.mark.parametrize("shape", ["decoder", "encoder", "encoder_decoder"])
def test_tokens_against_plain_torch(shape: str) -> None:
    """The whole student under its teacher: loss and gradients as by hand, and the teacher stays as it is."""
    size = {"shape": shape, "vocab_size": 200, "num_heads": 2, "max_sequence_length": 32}
    models = []
    for seed, changes in ((1, {"hidden_size": 16, "num_layers": 1}), (2, {"hidden_size": 32, "num_layers": 2})):
        model = Transformer(ModelConfig(**size, **changes))
        model.init_weights(seed)
        with torch.no_grad():
            model.head.weight.mul_(20)
        models.append(model)
    student, teacher = models[0], models[1].eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)

    def some(length: int) -> torch.Tensor:
        return torch.randint(200, (3, length), generator=generator)

    inputs = {"tokens": some(12), "segment_ids": (torch.arange(12) >= 6).long().expand(3, 12)}
    if shape == "encoder":
        inputs["columns"] = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4], [7, 8, 0, 0]])
    if shape == "encoder_decoder":
        inputs |= {"target_tokens": some(7), "target_segment_ids": torch.zeros(3, 7, dtype=torch.long)}
    labels = some({"decoder": 12, "encoder": 4, "encoder_decoder": 7}[shape])
    labels[2, -2:] = -100

    class Rows:
        def __init__(self) -> None:
            self.labels = labels

        def inputs(self) -> dict[str, torch.Tensor]:
            return inputs | {"labels": labels}

    settings = DistillConfig(teacher="x", weight=0.7, temperature=2.0)
    task = Distilled(LikelihoodTask(z_loss=1e-3), teacher, settings)
    found = task.loss(student, Rows())
    found.loss_sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    logits, expected = (model(**inputs)[labels != -100] for model in (student, teacher))
    plain = F.cross_entropy(logits, labels[labels != -100], reduction="sum")
    known = 0.3 * (plain + 1e-3 * logits.logsumexp(-1).square().sum()) + 0.7 * 4 * F.kl_div(
        F.log_softmax(logits / 2, -1), F.softmax(expected / 2, -1), reduction="sum"
    )
    known.backward()
    assert found.loss_sum.item() == pytest.approx(known.item(), rel=1e-5)
    assert found.reported_sum.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_classes_against_plain_torch() -> None:
    """The divergence counts texts that have a label, and leaves what is reported alone."""

    class Classes:
        labels = torch.tensor([1, -100, 0])

    answers = {"student": torch.randn(3, 2, requires_grad=True), "teacher": torch.randn(3, 2)}

    class Own:
        def loss(self, model: Any, batch: Any) -> Loss:
            entropy = F.cross_entropy(model(tokens=None), batch.labels, ignore_index=-100, reduction="sum")
            return Loss(entropy, entropy.detach())

    settings = DistillConfig(teacher="x", weight=0.25, temperature=3.0)
    task = Distilled(Own(), lambda tokens, on_demand: answers["teacher"], settings)  # type: ignore[arg-type]
    found = task.loss(lambda tokens: answers["student"], Classes())
    rows = torch.tensor([0, 2])
    entropy = F.cross_entropy(answers["student"][rows], torch.tensor([1, 0]), reduction="sum")
    distance = F.kl_div(
        F.log_softmax(answers["student"][rows] / 3, -1), F.softmax(answers["teacher"][rows] / 3, -1), reduction="sum"
    )
    assert found.loss_sum.item() == pytest.approx((0.75 * entropy + 0.25 * 9 * distance).item(), rel=1e-5)
    assert found.reported_sum.item() == pytest.approx(entropy.item())


@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_learn_the_same(teacher: Path, corpus: Path, tmp_path: Path, stage: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    steps = "train.max_steps=6"
    for run_dir, ranks in ((one, 1), (two, 2)):
        arguments = student_of(teacher, corpus, run_dir, steps, f"engine.zero_stage={stage}")
        done = pretrain(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "teacher: " in done.stdout
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.dist
def test_a_killed_student_loses_nothing_and_keeps_its_teacher(teacher: Path, texts: Path, tmp_path: Path) -> None:
    """task=distill: the tokenizer comes from the teacher."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"

    def arguments(folder: Path) -> list[str]:
        settings = ["task=distill", f"data.train={texts}", f"distill.teacher={teacher}", f"run_dir={folder}", *SMALL]
        return [*settings, "train.max_steps=25", "train.checkpoint_every=6 steps", "model.dropout=0.1"]

    said = finetuned(*arguments(straight))
    assert "its weight in the loss 0.5, at temperature 1" in said
    kill_at(run_dir, 14, *arguments(run_dir))
    resumed = finetuned(*arguments(run_dir))
    assert "resumed from" in resumed
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)
    measured = results(run_dir)["validation"]
    assert measured["loss"] == pytest.approx(results(straight)["validation"]["loss"], rel=1e-6)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]), rel=1e-6)

    earlier = f"distill.teacher={teacher / 'checkpoints' / 'step-00000020'}"
    longer = ["train.max_steps=30", "allow_changes=[train.max_steps,distill.teacher]"]
    refused = finetune(*arguments(run_dir), earlier, *longer)
    assert refused.returncode == 2 and "was trained with another teacher" in refused.stderr, refused.stderr


@pytest.mark.slow
def test_copied_layers(teacher: Path, texts: Path, tmp_path: Path) -> None:
    """A student that begins with every second block of its teacher, before it learns anything."""
    run_dir = tmp_path / "run"
    width = ["model.hidden_size=64", "model.num_heads=2", "model.num_layers=2", "model.max_sequence_length=64"]
    settings = ["task=distill", f"data.train={texts}", f"distill.teacher={teacher}", "distill.copy_layers=true", *width]
    finetuned(*settings, f"run_dir={run_dir}", "train.max_steps=1", "optimizer.learning_rate=0")
    student, taught_by = (dict(bigtx.load(run, device="cpu").model.named_parameters()) for run in (run_dir, teacher))
    for name, parameter in student.items():
        assert torch.equal(parameter, taught_by[name.replace("blocks.1.", "blocks.2.")]), name
    done = finetune(*settings, f"run_dir={tmp_path / 'other'}", "train.max_steps=1", "model.hidden_size=32")
    assert done.returncode == 2 and "only the numbers of layers may differ" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_layers_of_an_adapted_teacher_are_those_it_computes_with(
    teacher: Path, texts: Path, tmp_path: Path
) -> None:
    common, adapted = ["task=distill", f"data.train={texts}", "train.max_steps=1"], tmp_path / "adapted"
    adapters = ["model.lora.rank=2", "optimizer.learning_rate=0.1", "schedule.name=constant", "schedule.warmup=0 steps"]
    finetuned(
        *common, *adapters, f"base={teacher}", f"distill.teacher={teacher}", f"run_dir={adapted}", "train.max_steps=3"
    )
    run_dir = tmp_path / "run"
    width = ["model.hidden_size=64", "model.num_heads=2", "model.num_layers=2", "model.max_sequence_length=64"]
    settings = [f"distill.teacher={adapted}", "distill.copy_layers=true", f"run_dir={run_dir}", *width]
    finetuned(*common, *settings, "optimizer.learning_rate=0")
    merged, plain = MergedCheckpoint(preferred(adapted)), Checkpoint(preferred(adapted))
    changed = 0
    for name, parameter in bigtx.load(run_dir, device="cpu").model.named_parameters():
        origin = name.replace("blocks.1.", "blocks.2.")
        taken, before = (source.read(origin, "master", 0, parameter.numel()) for source in (merged, plain))
        assert torch.equal(parameter.flatten(), taken), name
        changed += not torch.equal(taken, before)
    assert changed, "the adapters changed something"


@pytest.mark.slow
def test_answers_to_prompts_have_a_teacher_too(teacher: Path, tmp_path: Path) -> None:
    """Any decoder of the tokenizer can teach sft: here one that has seen texts alone, and a student that follows it."""
    records = [{"prompt": record["text"], "response": record["label"]} for record in labelled(40)]
    data, run_dir = write_jsonl(tmp_path / "data.jsonl", records), tmp_path / "run"
    said = finetuned(
        "task=sft",
        f"data.train={data}",
        f"distill.teacher={teacher}",
        *SMALL,
        "chat.format=plain",
        "train.max_steps=20",
        f"run_dir={run_dir}",
    )
    assert "teacher: " in said
    found = losses(run_dir)
    assert found[20] < found[1]


@pytest.mark.slow
def test_classes_are_learned_from_soft_labels_alone(corpus: Path, tmp_path: Path) -> None:
    """With weight 1 the labels of the records say nothing: a student on turned labels learns what its teacher knows."""
    base = make_base(corpus, tmp_path / "base", steps=4)
    good = write_jsonl(tmp_path / "good.jsonl", labelled(240))
    held = write_jsonl(tmp_path / "held.jsonl", labelled(80, seed=2))
    turned = [record | {"label": {"joy": "woe", "woe": "joy"}[record["label"]]} for record in labelled(240)]
    bad = write_jsonl(tmp_path / "bad.jsonl", turned)
    common = ["task=classify", f"data.validation={held}", "train.max_steps=40", "train.global_batch_size=16"]
    taught_by, run_dir = tmp_path / "teacher", tmp_path / "student"
    finetuned(*common, f"base={base}", f"data.train={good}", f"run_dir={taught_by}")
    assert results(taught_by)["validation"]["accuracy"] > 0.8
    distilled = [f"data.train={bad}", f"distill.teacher={taught_by}", "distill.weight=1", "distill.temperature=2"]
    finetuned(*common, *distilled, *SMALL, f"run_dir={run_dir}", "optimizer.learning_rate=1e-2")
    assert results(run_dir)["validation"]["accuracy"] > 0.75


def test_what_does_not_fit_is_refused(teacher: Path, corpus: Path, texts: Path, tmp_path: Path) -> None:
    source = ["task=distill", f"data.train={texts}", f"run_dir={tmp_path / 'run'}", "train.max_steps=2", *SMALL]
    empty = tmp_path / "empty"
    empty.mkdir()
    for changes, expected in (
        ([], "distill.teacher: is not given"),
        (["distill.teacher=nowhere"], "no such folder; name a run or one of its checkpoints"),
        ([f"distill.teacher={teacher}", "distill.temperature=0"], "the least is 0.01"),
        ([f"distill.teacher={teacher}", "distill.copy_layers=true", f"base={teacher}"], "weights already come from"),
        ([f"distill.teacher={teacher}", "task=preference"], "does not work with task=preference"),
        (["task=sft", f"base={teacher}", "distill.weight=0.1"], "has no effect without distill.teacher"),
        ([f"distill.teacher={empty}"], "is not a run: it has no config.yaml"),
    ):
        done = finetune(*source, *changes)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert expected in done.stderr, done.stderr


def test_a_teacher_that_is_another_kind_of_model(teacher: Path, corpus: Path) -> None:
    """All that does not fit is named at once, before weights are read."""
    from bigtx.train.teacher import Teacher

    known = Teacher(preferred(teacher))
    fitting = {"vocab_size": known.model.vocab_size, "max_sequence_length": 64}

    def problems(longest: int = 64, task: str = "distill", **changes: Any) -> str:
        config = from_dict(FinetuneConfig, {"task": task, "model": fitting | changes, "distill": {"teacher": "T"}})
        return "; ".join(known._problems(config, known.tokenizer, longest))

    assert problems() == ""
    assert "its model.shape is decoder, and the student's encoder" in problems(shape="encoder")
    assert f"write model.vocab_size={known.model.vocab_size}" in problems(vocab_size=5000)
    assert "its model.prefix_attention is False" in problems(prefix_attention=True)
    assert "it predicts tokens, which the student does not" in problems(task="classify", num_classes=2)
    known.model.positions = "learned"
    assert "it has 64 learned positions, and rows are up to 65 long" in problems(longest=65)
    known.tokenizer.fingerprint = "another"
    other = Tokenizer.load(teacher / "tokenizer")
    config = from_dict(FinetuneConfig, {"model": fitting})
    assert "its tokenizer is not the student's" in "; ".join(known._problems(config, other, 64))
    assert task_type("distill").__name__ == "Distill"
