"""Which special ids a text gets: those that transformers gives it, for every family and wherever ids are made."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bigtx
from bigtx.cli import main
from bigtx.config.schema import ChatConfig, FieldsConfig, FinetuneConfig, ModelConfig, RecordsConfig
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.records.record import Record
from bigtx.finetuning.tasks.classify import Classify
from bigtx.finetuning.tasks.preference import Preference
from bigtx.finetuning.tasks.sft import Distill, Sft
from bigtx.finetuning.tasks.translate import Translate
from bigtx.interop.tokenizer import compare_tokenizers, export_tokenizer, import_tokenizer
from bigtx.tokenizer.special import DESCRIPTION
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError

tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
from interop.tiny_tokenizers import FAMILIES, save_tokenizer  # noqa: E402 - needs the extra

FIRST, SECOND = "The river ran to the sea.", "What is 1 boat?"
BEGINS = {"llama": ["<s>"], "mistral": ["<s>"], "mixtral": ["<s>"], "nanochat": ["<|bos|>"]}
ENCODERS = ("bert", "roberta", "modernbert")


def load(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def special(theirs: Any, *texts: str) -> tuple[list[int], list[int] | None]:
    """The ids of texts by transformers' defaults, and the token types where the model reads them."""
    encoded = theirs(*texts)
    return encoded["input_ids"], encoded.get("token_type_ids")


def set_template(folder: Path, single: str) -> None:
    """Give a tokenizer.json another template."""
    path = folder / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(path))
    names = [name for name in single.split() if name != "$A"]
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[(name, own.token_to_id(name)) for name in names]
    )
    own.save(str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_special_ids_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    theirs = load(save_tokenizer(source, family))
    import_tokenizer(source).save(run)
    tokenizer = Tokenizer.load(run)
    sides = tokenizer.encode_batch([FIRST, SECOND])
    for texts, ids in (((FIRST,), sides[:1]), ((FIRST, SECOND), sides)):
        expected, types = special(theirs, *texts)
        found = tokenizer.join(*ids)
        assert found == (expected, found[1] if types is None else types)
        assert len(expected) == sum(map(len, ids)) + tokenizer.num_special(len(ids))
    single = theirs(FIRST)["input_ids"]
    # A prompt is gone on with, so it has no end; a document has one.
    begins = theirs.convert_tokens_to_ids(BEGINS.get(family, []))
    if family not in (*ENCODERS, "t5"):
        assert tokenizer.encode_prompts([FIRST])[0] == single == [*begins, *sides[0]]
        assert tokenizer.encode_prompts([""])[0] == (begins or [tokenizer.end_id])
    documents, lengths = tokenizer.encode_documents([FIRST, SECOND])
    end = [] if single[-1] == tokenizer.end_id else [tokenizer.end_id]
    assert documents[: lengths[0]].tolist() == [*single, *end]
    assert documents[lengths[0] :].tolist() == [*theirs(SECOND)["input_ids"], *end]

    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    export_tokenizer(tokenizer, out, model_type=family, max_length=64)
    assert compare_tokenizers(tokenizer, out) == []
    again = load(out)
    assert again(FIRST)["input_ids"] == single
    assert again(FIRST, SECOND)["input_ids"] == theirs(FIRST, SECOND)["input_ids"]
    assert import_tokenizer(out).fingerprint == tokenizer.fingerprint


def test_the_comparison_sees_other_special_ids(tmp_path: Path) -> None:
    tokenizer = import_tokenizer(save_tokenizer(tmp_path, "bert"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert [line.partition(":")[0] for line in compare_tokenizers(tokenizer, tmp_path)] == [
        "one text with special ids",
        "two texts with special ids",
    ]


def test_a_template_that_only_the_class_knows_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "bert")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(DataError, match=r"one text with special ids: from token 0 on.*save_pretrained") as told:
        import_tokenizer(tmp_path)
    advice = str(told.value)
    subprocess.run([sys.executable, *shlex.split(advice[advice.index("python -c") :])[1:]], check=True)
    tokenizer = import_tokenizer(tmp_path)
    assert tokenizer.join(tokenizer.encode(FIRST))[0] == load(tmp_path)(FIRST)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_documents_of_a_corpus_begin_as_transformers_has_them(family: str, tmp_path: Path) -> None:
    theirs = load(save_tokenizer(tmp_path / "source", family))
    run_command("tokenizer", "import", tmp_path / "source", "-o", tmp_path / "own")
    (tmp_path / "texts").mkdir()
    lines = [FIRST, SECOND, f"{FIRST} {SECOND}"]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = (f"input.paths={tmp_path / 'texts'}", f"tokenizer={tmp_path / 'own'}", f"output={tmp_path / 'corpus'}")
    run_command("data", "prepare", *settings, "validation_fraction=0", "num_processes=1")
    run_command("data", "verify", tmp_path / "corpus")
    manifest = Manifest.load(tmp_path / "corpus" / "train")
    tokens = BlockReader(manifest).block(0)[0]
    found = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == manifest.end_id) + 1)]
    end = [] if family == "roberta" else [theirs.eos_token_id]
    assert sorted(found) == sorted([[], *([*theirs(line)["input_ids"], *end] for line in lines)])


@pytest.mark.parametrize(("single", "is_flagged"), [("<s> $A </s>", False), ("$A </s>", True), ("$A", True)])
def test_tokenizer_json_has_the_last_word(single: str, is_flagged: bool, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama", add_bos_token=is_flagged, add_eos_token=not is_flagged)
    set_template(tmp_path, single)
    tokenizer, theirs = import_tokenizer(tmp_path), load(tmp_path)
    whole = theirs(FIRST)["input_ids"]
    assert tokenizer.join(tokenizer.encode(FIRST))[0] == whole
    # A text that goes on has no end, and a document has one.
    has_end = "</s>" in single
    assert tokenizer.encode_prompts([FIRST])[0] == (whole[:-1] if has_end else whole)
    assert tokenizer.encode_documents([FIRST])[0].tolist() == (whole if has_end else [*whole, tokenizer.end_id])


def test_a_begin_id_that_ends_texts_too_stands_once_between_documents(tmp_path: Path) -> None:
    set_template(save_tokenizer(tmp_path, "gpt2"), "<|endoftext|> $A")
    tokenizer = import_tokenizer(tmp_path)
    assert tokenizer.encode_prompts([FIRST])[0][0] == tokenizer.end_id == tokenizer.begin_id
    ids, lengths = tokenizer.encode_documents([FIRST, SECOND])
    assert np.flatnonzero(ids == tokenizer.end_id).tolist() == (np.cumsum(lengths) - 1).tolist()


def test_a_tokenizer_that_an_earlier_release_saved_gives_the_ids_of_then(tmp_path: Path) -> None:
    new = import_tokenizer(save_tokenizer(tmp_path / "source", "bert"))
    old = Tokenizer(new.model, new.special, new.origin, new.settings_files)
    old.save(tmp_path / "old")
    assert json.loads((tmp_path / "old" / DESCRIPTION).read_text())["format"] == 1
    loaded = Tokenizer.load(tmp_path / "old")
    ids, end = loaded.encode(FIRST), loaded.end_id
    assert loaded.fingerprint == old.fingerprint != new.fingerprint
    assert loaded.join(ids, ids) == ([end, *ids, end, *ids, end], [0] * (len(ids) + 2) + [1] * (len(ids) + 1))
    assert loaded.encode_documents([FIRST])[0].tolist() == [*ids, end]
    assert loaded.encode_sources([FIRST]) == [[*ids, end]]


@pytest.mark.parametrize(
    ("family", "line"),
    [("roberta", "<s> TEXT </s>; <s> TEXT </s> </s> PAIR </s>"), ("llama", "<s> TEXT; <s> TEXT <s> PAIR")],
)
def test_the_commands_show_what_stands_around_texts(
    family: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command("tokenizer", "import", save_tokenizer(tmp_path / "source", family), "-o", tmp_path / "own")
    run_command("tokenizer", "inspect", tmp_path / "own", "--text", "a")
    assert capsys.readouterr().out.count(f"Around texts: {line}\n") == 2


def test_a_damaged_template_is_named(tmp_path: Path) -> None:
    import_tokenizer(save_tokenizer(tmp_path / "source", "bert")).save(tmp_path / "own")
    path = tmp_path / "own" / DESCRIPTION
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"template": {"single": [[2, 0]], "pair": []}}))
    with pytest.raises(DataError, match="is damaged"):
        Tokenizer.load(tmp_path / "own")
    values["template"]["single"] = [[None, 0]]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="do not belong together"):
        Tokenizer.load(tmp_path / "own")


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_classification_reads_what_transformers_reads(family: str, tmp_path: Path) -> None:
    theirs = load(save_tokenizer(tmp_path, family))
    tokenizer = import_tokenizer(tmp_path)
    model = ModelConfig(shape="encoder" if family in ENCODERS else "decoder", vocab_size=500, max_sequence_length=64)
    record = Record({"text": FIRST, "other": SECOND, "label": "a"}, "a")
    for fields, texts in ((FieldsConfig(), (FIRST,)), (FieldsConfig(pair="other"), (FIRST, SECOND))):
        config = FinetuneConfig(task="classify", model=model, data=RecordsConfig(fields=fields))
        task = Classify(Classify.resolve(config, tokenizer, [record, Record({"label": "b"}, "b")]), tokenizer)
        example = task.encode(record)
        ids, types = special(theirs, *texts)
        assert example.ids.tolist() == ids and (types is None or example.types.tolist() == types)
        # A text that is too long keeps its special ids.
        task.max_length = len(ids) - 2
        cut = task.encode(record)
        assert len(cut.ids) == len(ids) - 2 and cut.num_cut == 2
        assert [i for i in cut.ids.tolist() if i in tokenizer.special.all()] == [
            i for i in ids if i in tokenizer.special.all()
        ]


def test_prompts_of_fine_tuning_begin_as_transformers_has_them(tmp_path: Path) -> None:
    theirs = load(save_tokenizer(tmp_path, "llama"))
    tokenizer = import_tokenizer(tmp_path)
    model = ModelConfig(vocab_size=400, max_sequence_length=64)
    config = FinetuneConfig(task="sft", model=model, chat=ChatConfig(separator="\n"))
    read = theirs(f"{FIRST}\n")["input_ids"]
    fields = {"prompt": FIRST, "response": "a boat", "chosen": "a boat", "rejected": "a sea"}
    sft = Sft(Sft.resolve(config, tokenizer, []), tokenizer)
    example = sft.encode(Record(fields, "a"))
    assert example.ids.tolist() == [*read, *tokenizer.encode("a boat"), tokenizer.end_id]
    assert example.is_answer.tolist() == [place >= len(read) for place in range(len(example.ids))]
    pairs = Preference(Preference.resolve(config, tokenizer, []), tokenizer)
    assert pairs.encode(Record(fields, "a")).prompt.tolist() == read
    # What is cut off is text, not the begin id.
    sft.format.max_length = 12
    cut = sft.encode(Record(fields, "a"))
    num_answer = int(example.is_answer.sum())
    assert cut.ids.tolist() == [read[0], *example.ids.tolist()[-11:]] and cut.is_answer.sum() == num_answer
    assert cut.num_cut == len(example.ids) - 12

    distilled = Distill(Distill.resolve(config, tokenizer, []), tokenizer).encode(Record({"text": FIRST}, "a"))
    assert distilled.ids.tolist() == [*theirs(FIRST)["input_ids"], tokenizer.end_id]
    assert distilled.is_answer.tolist() == [False] + [True] * (len(distilled.ids) - 1)


@pytest.mark.parametrize(("family", "shape"), [("t5", "encoder_decoder"), ("llama", "decoder")])
def test_sources_are_read_as_transformers_reads_them(family: str, shape: Any, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    theirs = load(save_tokenizer(tmp_path, family))
    tokenizer = import_tokenizer(tmp_path)
    model = ModelConfig(shape=shape, vocab_size=500, max_sequence_length=64)
    config = FinetuneConfig(task="translate", model=model)
    task = Translate(Translate.resolve(config, tokenizer, []), tokenizer)
    example = task.encode(Record({"source": FIRST, "target": SECOND}, "a"))
    ids = theirs(FIRST)["input_ids"]
    assert example.source.tolist() == (ids if family == "t5" else [*ids, tokenizer.end_id])
    assert example.target.tolist() == [*tokenizer.encode(SECOND), tokenizer.end_id]


def test_chats_begin_with_the_begin_id_here_and_there(tmp_path: Path) -> None:
    source, out = save_tokenizer(tmp_path / "source", "nanochat"), tmp_path / "out"
    own = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    own.add_special_tokens(["<|user|>", "<|assistant|>"])
    own.save(str(source / "tokenizer.json"))
    tokenizer = import_tokenizer(source)
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    export_tokenizer(tokenizer, out, model_type="nanochat", max_length=64)
    chat = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": SECOND}]
    ids = tokenizer.encode_chat(chat)
    assert ids[:2] == [tokenizer.begin_id, tokenizer.role_ids["user"]]
    assert load(out).apply_chat_template(chat, return_dict=False) == ids
    assert compare_tokenizers(tokenizer, out) == []
    sft = Sft(
        Sft.resolve(FinetuneConfig(task="sft", model=ModelConfig(vocab_size=500)), tokenizer, []),
        tokenizer,
    )
    assert sft.encode(Record({"messages": chat}, "a")).ids.tolist() == ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose own tokenizer puts <s>, and a space, before a text; several ids end one."""
    folder = save_tokenizer(tmp_path_factory.mktemp("llama") / "source", "llama")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **{"vocab_size": len(load(folder)), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.5},
        **{"bos_token_id": 1, "eos_token_id": [2, 7]},
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:263] = 0.0  # No special ids and no single bytes by chance.
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=[2, 7])
    model.save_pretrained(folder)
    return folder


def written_by_transformers(folder: Path, prompt: str, *, num_tokens: int = 12) -> tuple[list[int], str]:
    """The likeliest tokens after a prompt, by the defaults of the tokenizer and of the model, and what they say."""
    model, reader = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), load(folder)
    read = reader(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**read, do_sample=False, max_new_tokens=num_tokens)[0].tolist()
    before = reader.decode(read["input_ids"][0], skip_special_tokens=True)
    return ids[read["input_ids"].shape[1] :], reader.decode(ids, skip_special_tokens=True)[len(before) :]


def run_command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_what_is_generated_comes_back_space_and_all(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command("import", llama, "-o", tmp_path / "run")
    loaded = bigtx.load(tmp_path / "run", device="cpu")
    pieces = {loaded.tokenizer.id_to_piece(i): i for i in range(loaded.tokenizer.vocab_size)}
    prompts = [FIRST, "", "What is"]
    # Whatever the model writes, one text begins with a space.
    texts = [written_by_transformers(llama, prompt)[1] for prompt in prompts]
    assert loaded.generate_batch(prompts, max_new_tokens=12, temperature=0.0) == texts
    capsys.readouterr()
    options = ("--temperature", 0, "--max-new-tokens", 12)
    for prompt, text in zip(prompts, texts, strict=True):
        run_command("generate", tmp_path / "run", "--prompt", prompt, *options)
        assert capsys.readouterr().out == f"{prompt}{text}\n"
    (tmp_path / "prompts.txt").write_text(f"{FIRST}\nWhat is\n")
    run_command("generate", tmp_path / "run", "--prompts-file", tmp_path / "prompts.txt", *options)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["completion"] for line in lines] == [texts[0], texts[2]]
    # A space at the front is text after text, and the tokenizer's own where a text begins.
    sea = [pieces["▁sea"]]
    for before, text in ((loaded.tokenizer.encode_prompts([FIRST])[0], " sea"), ([1], "sea"), ([], "sea")):
        assert loaded.tokenizer.decode(sea, after=before) == text
        stream = loaded.tokenizer.stream(after=before)
        assert stream.push(sea[0]) + stream.flush() == text


def test_every_end_id_ends_a_text_and_is_exported(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free, _ = written_by_transformers(llama, FIRST)
    end = free[5]
    source = tmp_path / "source"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json"):
        values = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(values | {"eos_token_id": [2, end]}))
    ended, _ = written_by_transformers(source, FIRST)
    assert ended == [*free[: free.index(end)], end]
    run_command("import", source, "-o", tmp_path / "run")
    loaded = bigtx.load(tmp_path / "run", device="cpu")
    assert (loaded.tokenizer.end_id, loaded.tokenizer.end_ids) == (2, [2, end])
    shown = load(source).decode([*load(source)(FIRST)["input_ids"], *ended[:-1]], skip_special_tokens=True)
    assert loaded.generate(FIRST, max_new_tokens=12, temperature=0.0) == shown[len(FIRST) :]
    run_command("export", tmp_path / "run", "--to", "hf", "-o", tmp_path / "out", "--family", "llama")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [2, end]
    # Its tokenizer alone makes the same ids.
    assert Tokenizer.from_huggingface(source).fingerprint == loaded.tokenizer.fingerprint
