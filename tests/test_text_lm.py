"""The benchmark on real text: what is read, how its bytes are counted, and that a training which is cut off goes on as if it was not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_elastic import elastify

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEXTS = ["def f(x):\n    return x + 1\n" * 3, "naïve café – 3 € for 🙂🙂\n" * 4, "\x00 and tabs\t\t\n"]
"""With characters of one to four bytes."""


@pytest.fixture
def text_lm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import each other by name from their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import text_lm

    return text_lm


@pytest.fixture
def tokenizer(text_lm: Any) -> Any:
    return text_lm.train_tokenizer(TEXTS[:1], 300)


def tiny(text_lm: Any) -> Any:
    return text_lm.replace(text_lm.SCALES["5m"], **text_lm.TINY)


def test_tokens_are_as_many_bytes_as_the_text(text_lm: Any, tokenizer: Any) -> None:
    """In texts that the tokenizer was not trained on, too, whose characters it splits."""
    lengths = text_lm.token_bytes(tokenizer)
    for text in TEXTS:
        tokens = text_lm.encode(tokenizer, [text]).long()
        assert int(lengths[tokens].sum()) == len(text.encode())
        assert tokenizer.decode(tokens[1:-1]) == text
    euro = text_lm.encode(tokenizer, ["€"])[1:-1].long()
    assert lengths[euro].tolist() == [1, 1, 1]
    assert int(lengths.max()) > 4  # words were merged
    assert lengths[tokenizer.eos_token_id] == 0


@pytest.mark.parametrize("row", [2, 7, 32])
def test_every_token_is_a_target_once(text_lm: Any, row: int) -> None:
    """Tokens that are numbered tell how often they are targets; only what does not fill a row is left out."""
    tokens = torch.arange(100, dtype=torch.int32)
    targets = text_lm.windows(tokens, row)[:, 1:].flatten().tolist()
    assert targets == list(range(1, 1 + 99 // (row - 1) * (row - 1)))
    some = text_lm.windows(tokens, row, count=3)
    assert len(some) == 3
    assert some[0, 0] == 0
    assert len(set(some[:, 1:].flatten().tolist())) == 3 * (row - 1)


def test_bits_per_byte_are_those_of_the_definition(text_lm: Any, tokenizer: Any) -> None:
    """Token by token, each read with what its row has before it; at a budget by the size alone."""
    scale = text_lm.replace(tiny(text_lm), vocabulary=len(tokenizer))
    family = elastify(scale.parent(), budgets=scale.budgets, sort=False)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.mul_(3)  # away from a uniform distribution, of which every size would say the same
    tokens = text_lm.encode(tokenizer, TEXTS)
    rows, lengths = text_lm.windows(tokens, 16, count=5), text_lm.token_bytes(tokenizer)
    found = text_lm.bits_per_byte(family, rows, lengths, {"full": None, "third": "third"})
    for name in found:
        with family.at(None if name == "full" else name), torch.no_grad():
            bits = [
                -math.log2(family(row[None, :end].long()).logits[0, -1].double().softmax(0)[row[end]])
                for row in rows
                for end in range(1, 16)
            ]
        size = sum(int(lengths[token]) for row in rows for token in row[1:])
        assert found[name] == pytest.approx(sum(bits) / size, rel=1e-4)
    assert abs(found["full"] - found["third"]) > 0.01


@torch.enable_grad()
def test_training_that_was_cut_off_goes_on_as_if_it_was_not(text_lm: Any, tmp_path: Path) -> None:
    import language

    class Cut(language.Clock):
        """Over after so many looks at it."""

        def __init__(self, looks: int):
            super().__init__()
            self.looks = looks

        def over(self, share: float = 1.0) -> bool:
            self.looks -= 1
            return self.looks <= 0

    scale = tiny(text_lm)
    data = torch.randint(0, scale.vocabulary, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    def fit(**options: Any) -> dict[str, torch.Tensor]:
        rows = language.draw(data, scale.row, 1)
        return language.train(scale.parent(), rows, steps=5, batch_size=2, **options).state_dict()

    state = tmp_path / "state.pt"
    with pytest.raises(SystemExit, match="goes on from there"):
        fit(state=state, clock=Cut(3))
    assert torch.load(state, weights_only=True)["steps"] == 3
    resumed, whole = fit(state=state), fit()
    assert not state.exists()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    start = scale.parent().state_dict()
    assert not any(torch.equal(whole[name], start[name]) for name in whole if name.endswith("w1.weight"))


def test_files_are_in_one_split_each(text_lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of what a package has, only texts; a file is held out by its name, whatever it says, and the same text is read once."""
    import corpus

    words = {f"module_{number}.py": f"# number {number}\n" * 20 for number in range(200)}
    words |= {"copy_of_7.py": words["module_7.py"], "tests/test_it.py": "# a test\n" * 20, "short.py": "1\n"}
    words |= {"huge.py": "#\n" * corpus.LARGEST}
    for name, text in words.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 20)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py"))

    def found() -> Any:
        yield "pypi:made_up", "1.0", [(name, tmp_path / name) for name in names if corpus._wanted(name)]

    monkeypatch.setattr(corpus, "_pypi", found)
    monkeypatch.setattr(corpus, "_debian", lambda: iter(()))
    whole = corpus.collect(1 << 30)
    assert whole.packages == {"pypi:made_up": "1.0"}
    assert sorted([*whole.train, *whole.held_out]) == sorted(words[f"module_{number}.py"] for number in range(200))
    assert 1 <= len(whole.held_out) < 20
    for name in names:
        (tmp_path / name).write_text(f"# changed {name}\n" * 20, encoding="utf-8")
    changed = corpus.collect(1 << 30)
    assert {text.split("module_")[1].split(".")[0] for text in changed.held_out if "module_" in text} >= {
        text.split("number ")[1].split("\n")[0] for text in whole.held_out
    }
    part = corpus.collect(2000)
    assert part.train == changed.train[: len(part.train)]
    assert 2000 <= sum(map(len, part.train)) < 3000


def test_text_that_is_not_there_is_refused(text_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import corpus

    monkeypatch.setattr(corpus, "_pypi", lambda: iter(()))
    monkeypatch.setattr(corpus, "_debian", lambda: iter(()))
    with pytest.raises(FileNotFoundError, match="numpy"):
        corpus.collect(100)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["text_lm", "text_lm_gpu"])
def test_script_runs_and_says_what_it_read(script: str, tmp_path: Path) -> None:
    """In its smallest form; the larger scale computes in bfloat16. The exit status may be 1: so little training need not help."""
    output = tmp_path / "result.json"
    options = ["--quick", "--device", "cpu", "--output", str(output)]
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    found = {entry["name"]: entry for entry in result["measurements"]}
    assert "python" in found["text to train on"]["packages"]
    assert found["text held out, measured"]["median"] > 0
    assert all(f"{way}: quarter, bits per byte" in found for way in ("family", "split", "untrained"))
    assert not any(str(BENCHMARKS.parent) in str(entry) for entry in result["measurements"])
