"""The benchmark of recipes: its third task is what it says, and what it publishes is what was run."""

from __future__ import annotations

import json
import random
import re
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def cup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cup

    return cup


def test_a_tournament_is_played_by_what_is_known_by_heart(cup: Any) -> None:
    assert len(cup.WINS) == 26 * 25
    assert all(winner in pair and cup.WINS[pair[::-1]] == winner for pair, winner in cup.WINS.items())
    for seed in range(20):
        problem = cup.make_problem(random.Random(seed))
        players = re.sub(r"[\d^>]", "", problem.prompt)
        assert len(set(players)) == 8
        assert problem.prompt == "^" + "".join(f"{i + 1}{players[2 * i : 2 * i + 2]}" for i in range(4)) + ">"
        rounds, lines = [players], problem.thinking
        while len(rounds[-1]) > 1:
            winners = ""
            for a, b in list(pairwise(rounds[-1]))[::2]:
                match, lines = lines[:4], lines[4:]
                assert match[1:3] == a + b
                assert match[3] == cup.WINS[a, b]
                winners += match[3]
            rounds.append(winners)
        assert lines == ""
        champion, finalists = rounds[-1], rounds[-2]
        assert problem.answer == f"7{cup.HOME[champion]}6{cup.HOME[finalists[1]]}5{cup.HOME[finalists[0]]}"


def test_splits_share_no_prompt_and_tokens_give_the_text_back(cup: Any) -> None:
    train, held = ({p.prompt for p in islice(cup.problems(s, 7, 0), 300)} for s in ("train", "heldout"))
    assert len(train) == len(held) == 300
    assert not train & held
    tokenizer = cup.build_tokenizer()
    text = cup.TASK.solved(next(cup.problems("train", 7, 3)))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(re.sub("</?think>", "T", text))
    assert cup.new_parent(0).config.vocab_size == len(tokenizer)


def test_what_is_published_compares_runs_of_the_same_seed(cup: Any, tmp_path: Path) -> None:
    import recipe
    import report

    def kept(what: str, seed: int, **sizes: tuple[float, float]) -> None:
        entries = {size: {"exact": e, "validation": e, "kl": k} for size, (e, k) in sizes.items()}
        text = json.dumps({"result": {"steps": 9, **entries}, "steps": 100, "commit": "c"})
        (runs / f"recipe-cup-{what}-100-{seed}.json").write_text(text, encoding="utf-8")

    runs = tmp_path / "runs"
    runs.mkdir()
    for seed in (0, 1):
        kept("parent", seed, full=(1.0 - seed / 10, 0.0))
    kept("alone-half", 1, half=(0.75, 0.2))
    kept("standard", 0, full=(0.5, 0.1), half=(0.5, 0.1), third=(0.5, 0.1), quarter=(0.5, 0.1))
    for seed in (0, 1):
        score = 0.875 - seed / 4
        kept("several-sizes-a-step", seed, full=(score, 0.05), half=(score, 0.1), third=(0, 0), quarter=(0, 0))
    file = tmp_path / "recipe_cup.json"
    options = ["--task", "cup", "--steps", "100", "--kept", "--runs", str(runs), "--output", str(file)]
    assert recipe.main([*options, "--ways", "standard", "several sizes a step"]) == 1
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {claim["name"]: claim["value"] for claim in result["claims"]} == pytest.approx(
        {
            "several sizes a step - parent: full, exact": (-0.125 - 0.275) / 2,
            "several sizes a step - alone: half, exact": 0.625 - 0.75,  # seed 1 alone
        }
    )
    lines = report.recipes(tmp_path).splitlines()
    assert lines[0] == "| `cup` | steps | full | half | third | quarter | seeds |"
    assert "| parent |  | 0.95 (0.90–1.00) · 0.000 |  |  |  | 2 |" in lines
    assert "| alone | 100 each |  | 0.75 · 0.200 |  |  | 1 |" in lines
    assert "| standard | 100 | 0.50 · 0.100 | 0.50 · 0.100 | 0.50 · 0.100 | 0.50 · 0.100 | 1 |" in lines
    assert any(line.startswith("| several sizes a step | 180 | 0.75 (0.62–0.88) · 0.050 |") for line in lines)
    assert report.recipes(tmp_path / "nothing") == "Not measured yet.\n"


def test_every_way_is_a_run_of_the_steps_it_has(cup: Any) -> None:
    import recipe

    names = ["full", "half", "third", "quarter"]
    for way, fields in recipe.WAYS.items():
        made = fields(names, 541, 16)
        for stage in made.get("stages", [{"budget_probabilities": made.get("budget_probabilities")}]):
            drawn = stage["budget_probabilities"]
            assert drawn is None or sum(drawn.values()) == pytest.approx(1), way
        assert sum(stage["steps"] for stage in made.get("stages", [])) in (0, 541), way
        rows = made.get("per_device_train_batch_size", 16) * made.get("gradient_accumulation_steps", 1)
        assert rows == 16, way
