"""Texts that a tokenizer cannot read, and tokens that a model does not have: refused with a name wherever they come in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cases import VOCAB
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_elastic import ElasticForCausalLM, PhasePlan, TokenizerError, elastify, score
from hf_elastic.cli import main
from hf_elastic.evaluation.plans import measure_plan
from hf_elastic.generation.texts import check_text, check_tokens
from hf_elastic.lab.book_task import BookTask
from hf_elastic.lab.parent import PARENT_DIR, load_parent
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer

WORDS = {"hello": 0, "cafe": 1, "<eos>": 2, "e": 3}


def fast(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


def words(unknown: str | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    vocabulary = WORDS if unknown is None else {**WORDS, unknown: 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(backend, eos_token="<eos>", pad_token="<eos>", unk_token=unknown, **kwargs)


def pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({**WORDS, "[UNK]": 4}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return fast(backend, unk_token="[UNK]")


def byte_level() -> PreTrainedTokenizerFast:
    """As many are: the end of a text stands for unknown text, of which there is none."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 270, "initial_alphabet": alphabet, "special_tokens": ["<end>"], "show_progress": False}
    backend.train_from_iterator(["hello hello"], trainers.BpeTrainer(**options))
    return fast(backend, eos_token="<end>", unk_token="<end>")


def letters() -> PreTrainedTokenizerFast:
    """Leaves out what it does not know."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(["hello"], trainers.BpeTrainer(vocab_size=20, show_progress=False))
    return fast(backend)


@pytest.mark.parametrize(
    ("make", "text", "lost"),
    [
        (words, "hello  cafe\n", None),
        (words, "hello world", "'d', 'r', 'w' and others|'d', 'l', 'o', 'r', 'w'|'d'"),
        (lambda: words("<unk>"), "hello cafe <unk>", None),
        (lambda: words("<unk>"), "hello world <eos>", "'world'"),
        (pieces, "Café hello\x00\u200b", None),
        (pieces, "hello 世", "'世'"),
        (byte_level, "hello <end> 世\U0001f600 é\n\n", None),
        (letters, "hello\thell oo", None),
        (letters, "hello é", "'é'"),
        (letters, "\U0001f600hello", "'\U0001f600'"),
    ],
)
def test_what_a_tokenizer_loses_is_named(make, text, lost):
    if lost is None:
        return check_text(make(), text, "the prompt")
    with pytest.raises(TokenizerError, match=f"the prompt: the tokenizer has no tokens for .*({lost})"):
        check_text(make(), text, "the prompt")


def test_what_a_model_does_not_have_is_named():
    check_tokens(torch.tensor([[0, 63]]), 64, "it")
    check_tokens(torch.rand(3), 64, "it")
    check_tokens(torch.empty(1, 0, dtype=torch.long), 64, "it")
    with pytest.raises(TokenizerError, match="it has token 64, and the model's vocabulary ends at 63"):
        check_tokens(torch.tensor([[0, 64]]), 64, "it")
    with pytest.raises(TokenizerError, match="it has token -1"):
        check_tokens(torch.tensor([[0, -1]]), 64, "it")


# -- generation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(family_folder) -> ElasticForCausalLM:
    return ElasticForCausalLM.from_pretrained(family_folder("nano3"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"draft_budget": "small"},
        {"phase_plan": PhasePlan(start=None, end=None, max_thinking_tokens=1)},  # type: ignore[arg-type]
    ],
)
def test_generate_refuses_tokens_of_another_tokenizer(family, kwargs):
    for ids in (torch.tensor([[5, VOCAB]]), torch.tensor([[5, -1]])):
        for call in (lambda **k: family.generate(ids, **k), lambda **k: family.generate(inputs=ids, **k)):  # noqa: B023
            with pytest.raises(TokenizerError, match="the prompt has token"):
                call(**kwargs, max_new_tokens=2)
    assert family.generate(torch.tensor([[5, VOCAB - 1]]), max_new_tokens=2, **kwargs).shape[0] == 1


def test_markers_beyond_the_vocabulary_are_refused(family):
    names = [f"t{i}" for i in range(VOCAB)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, "<think>", "</think>"])}))
    backend.decoder = decoders.Fuse()
    with pytest.raises(ValueError, match=r"the tokenizer's token for '<think>'.*is none of the model's 64"):
        family.generate(torch.tensor([[5]]), phase_plan=PhasePlan(max_thinking_tokens=2), tokenizer=fast(backend))


# -- the lab's model with other tokenizers ------------------------------------------------------------------------------


def test_calibration_names_the_row(tmp_path):
    parent, tokenizer = load_parent()
    rows = [{"text": "^a4b+3>"}, {"text": "^a4 hello>"}]
    with pytest.raises(TokenizerError, match="calibration row 1: the tokenizer has no tokens for"):
        score(parent, rows, tokenizer=tokenizer, progress=False)
    with pytest.raises(ValueError, match="calibration row 1: text=None must be a text"):
        score(parent, [rows[0], {"text": None}], tokenizer=tokenizer, progress=False)
    chat = {"messages": [{"role": "user", "content": "^a4 hello>"}]}
    with pytest.raises(TokenizerError, match="calibration row 0: the tokenizer has no tokens for"):
        elastify(parent, [chat], ["hidden"], {"a": {"hidden": 40}}, tokenizer=tokenizer)
    for messages in ("^", ["^"], None):
        with pytest.raises(TokenizerError, match="must be a list of dicts with role and content"):
            score(parent, [{"messages": messages}], tokenizer=tokenizer, progress=False)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(
        TokenizerError,
        match="calibration row 0: the chat template refuses the messages: no such role. Give rows of text",
    ):
        score(parent, [{"messages": [{"role": "user", "content": "^"}]}], tokenizer=tokenizer, progress=False)
    with pytest.raises(TokenizerError, match="the tokenizer has no chat template"):
        score(parent, [chat], tokenizer=words(), progress=False)


def test_the_task_of_the_lab_needs_its_tokenizer():
    parent, _ = load_parent()
    model = ElasticForCausalLM(parent.config).eval()
    for tokenizer in (words(), words("<unk>")):
        tokenizer.padding_side = "left"
        with pytest.raises(TokenizerError, match="task 'book': the tokenizer"):
            measure_plan(
                model, tokenizer, BookTask(letters=3, count=2), PhasePlan(start=None, end=None, max_thinking_tokens=2)
            )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "stream"), [("unknown", False), ("fails", False), ("fails", True), ("beyond", False), ("beyond", True)]
)
def test_training_refuses_what_it_cannot_read(tmp_path, what, stream):
    parent, own = load_parent()
    model = ElasticForCausalLM(parent.config)
    tokenizer = {"unknown": words("<unk>"), "fails": words(), "beyond": own}[what]
    rows: list[dict[str, Any]] = [{"text": "hello world"}] * 4
    if what == "beyond":
        rows = [{"input_ids": [5, 6, 7]}] * 3 + [{"input_ids": [5, 99, 7]}]
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    args = ElasticDistillationConfig(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        per_device_train_batch_size=4,
    )  # fmt: skip
    with torch.enable_grad(), pytest.raises(TokenizerError, match="row 3 of the train|no tokens|cannot read|a row of"):
        ElasticDistillationTrainer(model, args=args, train_dataset=data, processing_class=tokenizer).train()


@pytest.fixture(scope="module")
def plain_family(tmp_path_factory) -> str:
    parent, tokenizer = load_parent()
    folder = tmp_path_factory.mktemp("texts") / "family"
    ElasticForCausalLM(parent.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_commands_say_so(plain_family, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "what is 2?"}) + "\n")
    elastic = ["elastify", str(PARENT_DIR), str(tmp_path / "out"), "--axis", "hidden", "--budget", "a:hidden=40"]
    for argv in (["generate", plain_family, "what is 2?"], [*elastic, "--calibration", str(tmp_path / "text.jsonl")]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "the tokenizer has no tokens for" in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    words().save_pretrained(plain_family)
    AutoModelForCausalLM.from_pretrained(plain_family)
    assert main(["evaluate", plain_family, "--task", "book", "--count", "1"]) == 2
    assert "book is a task of the embedded lab" in capsys.readouterr().err
