"""Classifiers of transformers: `...ForSequenceClassification`, with the input and the head of each family.

A family's class summarizes a text in its own way (the last token, the first, the mean), and has its own head. Both are
settings of bigtx (`classify.pooling`, `model.class_head`), so a classifier that has those of its family is written and
read back tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigtx.config import shape
from bigtx.config.schema import ClassifyConfig, FinetuneConfig, ModelConfig, RunConfig
from bigtx.utils.errors import ConfigError

if TYPE_CHECKING:
    from bigtx.interop.family import Family
    from bigtx.tokenizer.tokenizer import Tokenizer

AUTO_CLASS = "AutoModelForSequenceClassification"
ENDING = "ForSequenceClassification"
"""The prefix of default names of classes."""
PROBLEM_TYPE = "single_label_classification"
OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")

Pooling = Literal["first", "mean", "last"]


@dataclass(frozen=True)
class Classifier:
    """A family's class that classifies texts.

    Attributes:
        architecture: the name of the class.
        head: its model.class_head.
        poolings: the values of classify.pooling that it has, with the entries of config.json for each; a config.json
            without them means the first.
    """

    architecture: str
    head: Literal["transform", "pooler", "score"]
    poolings: Mapping[Pooling, Mapping[str, Any]]


def decoder_classifier(architecture: str) -> Classifier:
    """Return the classifier of a decoder, which reads the last token that is not padding."""
    return Classifier(architecture, "score", {"last": {}})


def pooling_of(run: RunConfig) -> str | None:
    """Return how a run's classifier summarizes a text; None if the run has no classifier."""
    return run.classify.pooling if isinstance(run, FinetuneConfig) and run.model.num_classes is not None else None


def auto_class(family: Family, config: ModelConfig) -> str:
    """Return the class of transformers that loads a model of a family."""
    return family.auto_class if config.num_classes is None else AUTO_CLASS


def architecture(family: Family, config: ModelConfig) -> str:
    """Return the class of transformers for a model of a family."""
    if config.num_classes is None:
        return family.architecture
    assert family.classifier is not None
    return family.classifier.architecture


def class_problems(family: Family, config: ModelConfig, pooling: str | None) -> list[str]:
    """Return the settings of a classifier that its family cannot express, each as "KEY=VALUE: why"; none for other
    models.

    Args:
        pooling: the resolved classify.pooling.
    """
    if config.num_classes is None:
        return []
    own, head = family.classifier, shape.class_head(config)
    if own is None:
        return [f"model.num_classes={config.num_classes}: transformers has no classifier for it"]
    problems = []
    if head != own.head:
        problems.append(f"model.class_head={head}: the family has {own.head}")
    if pooling not in own.poolings:
        problems.append(f"classify.pooling={pooling}: the family has {' or '.join(own.poolings)}")
    return problems


def write_classes(family: Family, run: RunConfig) -> dict[str, Any]:
    """Return the fields of config.json for a classifier; none for other models."""
    if not isinstance(run, FinetuneConfig) or run.model.num_classes is None:
        return {}
    assert family.classifier is not None
    names = run.classify.classes
    return {
        "architectures": [family.classifier.architecture],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": PROBLEM_TYPE,
        **family.classifier.poolings[run.classify.pooling],  # type: ignore[index]
    }


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Return whether a config.json names a class that classifies texts."""
    return _architecture(values).endswith(ENDING)


def read_classes(family: Family, values: Mapping[str, Any]) -> ClassifyConfig | None:
    """Return the classes of a config.json and how its model summarizes a text; None if it is not a classifier.

    Raises:
        ConfigError: bigtx does not have the head.
    """
    name = _architecture(values)
    if name.endswith(OTHER_HEADS):
        raise ConfigError(
            f"it is a {name}, and bigtx has no such head. The body of an encoder can be imported and fine-tuned: "
            "transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(BODY) writes it; for a decoder, import the "
            "model that predicts tokens"
        )
    if not is_classifier(values):
        return None
    if family.classifier is None or family.classifier.architecture != name:
        raise ConfigError(
            f"it is a {name}, but bigtx cannot read classifiers of model_type {family.model_type!r}; import the model "
            "that predicts tokens and fine-tune it with task=classify"
        )
    kind, names = values.get("problem_type"), _names(values)
    if kind not in (None, PROBLEM_TYPE) or len(names) < 2:
        what = f"problem_type={kind!r}" if len(names) > 1 else "one class, so it predicts a number"
        what = f"the {name} has {what}, but a classifier of bigtx assigns each text one of two or more classes"
        raise ConfigError(f"{what}; use it with transformers, or import the model that it was trained from")
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError("id2label has two classes with the same name, or one without a name; name each once")
    for pooling, fields in family.classifier.poolings.items():
        if all(values.get(key, value) == value for key, value in fields.items()):
            return ClassifyConfig(classes=names, pooling=pooling)
    found = {key: values.get(key) for fields in family.classifier.poolings.values() for key in fields}
    raise ConfigError(f"{found} is not one of the values that bigtx has: {list(family.classifier.poolings.values())}")


def _architecture(values: Mapping[str, Any]) -> str:
    named = values.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _names(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes in the order of their numbers; transformers' default names if there are none."""
    given = values.get("id2label")
    if not isinstance(given, Mapping):
        number = values.get("num_labels", 2)
        return [f"LABEL_{index}" for index in range(number if isinstance(number, int) else 2)]
    names = {str(key): str(name).strip() for key, name in given.items()}
    wanted = [str(number) for number in range(len(names))]
    if names.keys() != set(wanted):
        raise ConfigError(f"id2label numbers its classes {', '.join(names)}; they have to be 0, 1, 2 ...")
    return [names[number] for number in wanted]


def refuse_ambiguous_end(pooling: str | None, tokenizer: Tokenizer, pad_id: int | None, *, advice: str) -> None:
    """Refuse a decoder's classifier that would summarize a text by different tokens in transformers and in bigtx.

    transformers reads the last token that is not padding, bigtx the last one: these differ if the padding id ends a
    text too.

    Args:
        pooling: the run's classify.pooling.
        pad_id: the pad_token_id of config.json.
        advice: what to do, for the error.

    Raises:
        ConfigError: the tokens differ.
    """
    template = tokenizer.whole_text
    last = {parts[-1].id for parts in (template.single, template.pair)} & {pad_id} - {None}
    if pooling == "last" and last:
        raise ConfigError(
            f"the id {pad_id} ends each text and is the padding too: transformers would "
            f"summarize a text by the token before it, but bigtx by this token; {advice}"
        )
