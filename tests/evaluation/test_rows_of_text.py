"""Sizes measured on texts: against the definitions, and whatever the batches are."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BUDGETS
from torch.nn import functional as F

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.cli import main
from hf_elastic.elastification.calibration import batches_of
from hf_elastic.errors import ElasticConfigError
from hf_elastic.evaluation import texts
from hf_elastic.evaluation.texts import measure_texts

ROWS = [{"input_ids": row} for row in ([3, 9, 27, 17, 51, 25, 11], [5, 60, 2], [7], [8, 1, 44, 13, 30])]


@pytest.fixture(scope="module")
def family(original, tmp_path_factory) -> ElasticForCausalLM:
    folder = tmp_path_factory.mktemp("texts")
    original("granite").save_pretrained(folder)
    ElasticConfig.from_parent(original("granite").config, BUDGETS["granite"]).save_pretrained(folder)
    return ElasticForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1024), (4, 3)])
def test_numbers_are_what_their_names_say(batch_size, chunk, family, monkeypatch):
    """Written down from the definitions, row by row, without padding."""
    monkeypatch.setattr(texts, "CHUNK", chunk)
    found = measure_texts(family, batches_of(ROWS, batch_size, 100, None, None))
    assert [entry["name"] for entry in found] == ["full", "large", "medium", "small"]
    for entry in found:
        loss = divergence = same = tokens = 0.0
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                p = F.softmax(family(ids).logits[0, :-1].double(), -1)
                with family.at(entry["name"]):
                    q = F.softmax(family(ids).logits[0, :-1].double(), -1)
            loss -= float(q.gather(1, ids[0, 1:, None]).log().sum())
            divergence += float((p * (p / q).log()).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
        assert entry["tokens"] == tokens == 12
        expected = {"loss": loss, "kl": divergence, "agreement": same}
        assert {key: entry[key] for key in expected} == pytest.approx(
            {key: total / tokens for key, total in expected.items()}, abs=1e-4
        )
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    assert (found[0]["kl"], found[0]["agreement"]) == (0.0, 1.0)
    assert found[-1]["kl"] > 0.01
    assert family.budget is None or family.budget == "full"


def test_rows_without_anything_to_predict_are_refused(family):
    with pytest.raises(ElasticConfigError, match="no row has two tokens"):
        measure_texts(family, batches_of([{"input_ids": [7]}], 1, 100, None, None))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--data", "x.jsonl", "--task", "book"],
            "--data reads rows and prints what it finds, so --task would have no effect",
        ),
        (["--data", "x.jsonl", "--thinking", "a", "--output", "o"], "--thinking, --output would have no effect"),
        (
            ["--data", "x", "--handover", "auto", "--start", "<a>", "--end", "<b>", "--letters", "12", "--by", "cost"],
            "so --handover, --start, --end, --letters, --by would have no effect",
        ),
        (["--data", "x", "--prefill-speed", "2"], "so --prefill-speed would have no effect"),
        (["--data", __file__, "--split", "test"], "is a file, which has no splits; leave out --split"),
        (["--split", "test"], "the book task makes its own problems, so --split would have no effect"),
        (
            ["--task", "gsm8k", "--split", "test", "--letters", "3", "--batch-size", "2"],
            "--task gsm8k is one of lm-eval, so --split, --letters, --batch-size would have no effect",
        ),
        (["--data", "x.jsonl", "--count", "0"], "--count=0 must be at least 1"),
        (["--data", "x.jsonl", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["--data", "{tmp}/x.jsonl"], "x.jsonl does not exist"),
    ],
)
def test_wrong_arguments_of_the_command(more, message, tmp_path, capsys):
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in more]
    assert main(["evaluate", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
