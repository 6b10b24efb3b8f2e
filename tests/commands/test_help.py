"""The examples in `--help` work: they parse, and on small models, with experts and without, they run, in the order in which they are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from chats import WORDS, save_parent, write_chats

from hf_elastic.cli import COMMANDS, build_parser, main

RUN = ("elastify", "quantize", "plan", "slice", "export", "generate", "evaluate", "push")
"""Commands whose examples run here, one on what another has made. `train` runs in `test_first_path`, `lab` in its own tests."""

NOT_HERE = ("--upload", "--task", "--thinking", "nvfp4")
"""What sends something, needs lm-eval's data, a model that thinks, or sizes at multiples of 16."""


def help_of(command: str | None, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*([command] if command else []), "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """Lines that begin with the command, two spaces in, without their comments."""
    lines = re.findall(r"^  (?:torchrun .* -m hf_elastic\.cli|hf-elastic) (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if not re.match(r"COMMAND|\[", line)]


def test_examples_parse(capsys):
    seen = set()
    for command in (None, *COMMANDS):
        found = examples(help_of(command, capsys))
        assert found, f"hf-elastic {command} --help has no example"
        for words in found:
            assert command in (None, words[0])
            build_parser().parse_args(words)
            seen.add(words[0])
    assert seen == set(COMMANDS)


def test_no_line_is_too_long_for_a_terminal(capsys):
    """Nothing wraps texts that are laid out by hand."""
    for command in (None, *COMMANDS):
        for line in help_of(command, capsys).splitlines():
            assert len(line) <= 140, f"{command}: {line}"


@pytest.mark.parametrize("family", ["granitemoehybrid", "llama", "nemotron_h"])
def test_examples_run_on_every_kind_of_model(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_parent(Path("model"), family, [*WORDS, "Why", "the", "sky", "blue?"])
    write_chats(Path("chats.jsonl"), 24, seed=0)
    write_chats(Path("heldout.jsonl"), 8, seed=1)
    lines = [words for command in RUN for words in examples(help_of(command, capsys))]
    lines = [words for words in lines if not set(words) & set(NOT_HERE)]
    assert {words[0] for words in lines} == set(RUN)
    for words in lines:
        assert main(words) == 0, f"hf-elastic {shlex.join(words)}: {capsys.readouterr().err}"
    for folder in ("family", "family-half", "half"):
        assert (tmp_path / folder / "config.json").is_file()
