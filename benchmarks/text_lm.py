"""Real text at a size that means something: a hybrid language model of documentation and sources, and a family of sizes distilled from it in one run.

The text is that of installed packages (`corpus.py`; the result records which), one file in 32 held out. The tokenizer is a byte-level BPE trained
on the other files, the parent an `lfm2` (short convolutions and attention). Every size is measured in bits per byte of held-out files: after one run for
all sizes, distilled alone with as many steps for the three smaller sizes together as that run has, and cut without training. Every token of the
text that is measured is read once as a target, so that its bytes are counted once; tokens are read in rows, of which the first has nothing before it.

- `--size 5m`, the default: 5.7M parameters, for one core of a CPU. One seed (`--seeds`).
- `text_lm_gpu.py`: 125M parameters in bfloat16, for a GPU of 80 GB.

Runs are kept as `kept_runs.py` says; `--minutes 8` ends the script after so long, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import statistics
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, collect
from harness import Claim, Report
from kept_runs import KeptRuns, run_arguments
from language import Clock, draw, stream, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.lab.family import train_family

END = "<|endoftext|>"
SMALLER = ("half", "third", "quarter")
UNTRAINED = "bits per byte, {}: family / the same size cut without training"
SPLIT = "bits per byte, {}: family / alone, as many steps in all"
FULL = "bits per byte, full: after the run of the family / before"
CLAIMS = [*(Claim(UNTRAINED.format(name), 1.0) for name in SMALLER), Claim(FULL, 1.01)]
ALONE_CLAIMS = [Claim(SPLIT.format(name), 1.0) for name in SMALLER]
TOKENIZER_FILES = 2000
CONVOLUTION, ATTENTION = "conv", "full_attention"


@dataclass(frozen=True)
class Scale:
    """How large everything is. Steps are of `batch` rows of `row` tokens."""

    hidden: int
    ffn: int
    heads: int
    layers: tuple[str, ...]
    vocabulary: int
    budgets: Mapping[str, Mapping[str, int]]
    text_bytes: int
    row: int
    batch: int
    steps: int
    family_steps: int
    learning_rate: float
    family_learning_rate: float
    measured_rows: int
    bfloat16: bool = False
    calibration_rows: int = field(default=128)

    def parent(self) -> Lfm2ForCausalLM:
        torch.manual_seed(0)
        config = Lfm2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            block_auto_adjust_ff_dim=False,
            num_hidden_layers=len(self.layers),
            layer_types=list(self.layers),
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=4 * self.row,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return Lfm2ForCausalLM(config)


SCALES = {
    "5m": Scale(
        hidden=256,
        ffn=704,
        heads=8,
        layers=(CONVOLUTION, CONVOLUTION, ATTENTION) * 2,
        vocabulary=4096,
        budgets={
            "half": {"hidden": 176, "ffn": 512},
            "third": {"hidden": 136, "ffn": 352},
            "quarter": {"hidden": 104, "ffn": 288},
        },
        text_bytes=16_000_000,
        row=192,
        batch=4,
        steps=540,
        family_steps=120,
        learning_rate=2e-3,
        family_learning_rate=2e-3,
        measured_rows=128,
    ),
    "100m": Scale(
        hidden=768,
        ffn=2304,
        heads=12,
        layers=(CONVOLUTION, CONVOLUTION, ATTENTION) * 5,
        vocabulary=16384,
        budgets={
            "half": {"hidden": 528, "ffn": 1664},
            "third": {"hidden": 416, "ffn": 1152},
            "quarter": {"hidden": 320, "ffn": 928},
        },
        text_bytes=120_000_000,
        row=512,
        batch=48,
        steps=1000,
        family_steps=300,
        learning_rate=1e-3,
        family_learning_rate=1e-3,
        measured_rows=512,
        bfloat16=True,
    ),
}
TINY: dict[str, Any] = {
    "hidden": 32,
    "ffn": 64,
    "heads": 2,
    "layers": (CONVOLUTION, ATTENTION),
    "vocabulary": 384,
    "budgets": {
        "half": {"hidden": 24, "ffn": 48},
        "third": {"hidden": 16, "ffn": 32},
        "quarter": {"hidden": 8, "ffn": 16},
    },
    "text_bytes": 1_000_000,
    "row": 32,
    "batch": 4,
    "steps": 6,
    "family_steps": 6,
    "measured_rows": 16,
    "calibration_rows": 16,
}
"""What a quick run has instead."""


# -- text --------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and a token is so many bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=END, eos_token=END, bos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in a row, in `int32`, with the end token before, between and after them."""
    end = tokenizer.eos_token_id
    tokens = [end]
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        tokens += [*encoding.ids, end]
    return torch.tensor(tokens, dtype=torch.int32)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """How many bytes of text every token is; the end token is none. In a byte-level vocabulary a byte is a character."""
    lengths = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END else len(token)
    return lengths


def windows(tokens: torch.Tensor, row: int, count: int | None = None) -> torch.Tensor:
    """Rows that begin with the last token of the one before, so that every token but the first is a target of just one row.

    Args:
        count (`int`, *optional*): How many, evenly spread; all by default. What does not fill a row is left out.
    """
    rows = tokens.unfold(0, row, row - 1)
    return rows if count is None else rows[:: max(1, len(rows) // count)][:count]


@torch.no_grad()
def bits_per_byte(
    family: ElasticForCausalLM, rows: torch.Tensor, lengths: torch.Tensor, budgets: Mapping[str, Any]
) -> dict[str, float]:
    """Bits of all targets / bytes of all targets. The ends of files cost bits and are no bytes."""
    size = int(lengths[rows[:, 1:].long()].sum())
    bits = {}
    for name, budget in budgets.items():
        total = 0.0
        with family.at(budget):
            for part in rows.long().to(family.device).split(16):
                logits = family(part).logits[:, :-1].float().flatten(0, 1)
                total += float(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
        bits[name] = total / size / math.log(2)
    return bits


# -- runs --------------------------------------------------------------------------------------------------------------


class Study:
    """One scale: its text and tokenizer, and the runs on them."""

    def __init__(self, options: argparse.Namespace):
        scale = SCALES[options.size]
        self.scale = replace(scale, **TINY) if options.quick else scale
        self.runs, self.clock = KeptRuns(options, self.scale.family_steps), Clock(options.minutes)
        self.device, self.size = torch.device(options.device), options.size
        if self.device.type == "cuda":
            torch.set_num_threads(8)
        self.corpus: Corpus = collect(self.scale.text_bytes)
        self.tokenizer = self._tokenizer()
        self.lengths = token_bytes(self.tokenizer)
        self.train, self.held_out = self._tokens(self.corpus.train), self._tokens(self.corpus.held_out)
        self.rows = windows(self.held_out, self.scale.row, self.scale.measured_rows)
        self.budgets = {"full": None, **{name: name for name in self.scale.budgets}}

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.runs.path(f"text-{self.size}-tokenizer")
        if not folder.exists():
            train_tokenizer(self.corpus.train[:TOKENIZER_FILES], self.scale.vocabulary).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def _tokens(self, texts: list[str]) -> torch.Tensor:
        """Kept under the checksum of the texts, since a large text takes a while."""
        file = self.runs.path(f"text-{self.size}-{zlib.crc32(END.join(texts).encode()):08x}.pt")
        if not file.exists():
            torch.save(encode(self.tokenizer, texts), file)
        return torch.load(file, weights_only=True)

    def parent(self) -> Lfm2ForCausalLM:
        """Trained if it was not yet; from scratch, on the training text."""
        scale = self.scale

        def fit() -> Lfm2ForCausalLM:
            return train(
                scale.parent().to(self.device),
                draw(self.train, scale.row, 1),
                steps=scale.steps,
                batch_size=scale.batch,
                learning_rate=scale.learning_rate,
                constant=0.8,
                bfloat16=scale.bfloat16,
                state=self.runs.path(f"text-{self.size}-parent.pt"),
                clock=self.clock,
            )

        return self.runs.model(f"text-{self.size}-parent", fit).to(self.device)

    def family(self) -> ElasticForCausalLM:
        """The parent sorted by importance, with untrained budgets; a new one each time."""
        scale = self.scale

        def make() -> ElasticForCausalLM:
            rows = zip(draw(self.train, scale.row, 2), range(scale.calibration_rows), strict=False)
            calibration = [{"input_ids": row.tolist()} for row, _ in rows]
            return elastify(self.parent(), calibration, budgets=scale.budgets, batch_size=16, progress=False)

        return self.runs.model(f"text-{self.size}-sorted", make).to(self.device)

    def untrained(self) -> dict[str, float]:
        """Bits per byte of all sizes, before any run."""

        def action() -> dict[str, float]:
            return bits_per_byte(self.family(), self.rows, self.lengths, self.budgets)

        return self.runs.run(f"text-{self.size}-untrained", action)

    def distil(self, name: str, steps: int, seed: int, only: str | None = None) -> dict[str, float]:
        """Bits per byte of all sizes after one run, or of the only one that is drawn in it."""
        scale = self.scale
        measured = self.budgets if only is None else {only: only}
        settings: dict[str, Any] = {
            "per_device_train_batch_size": scale.batch,
            "learning_rate": scale.family_learning_rate,
            "bf16": scale.bfloat16,
            "seed": seed,
            **({} if only is None else {"budget_probabilities": {only: 1.0}}),
        }

        def action() -> dict[str, float]:
            self.clock.check(share=0.5)  # a run of a trainer is done whole
            family, rows = self.family(), stream(self.train, scale.row, 3 + seed)
            with tempfile.TemporaryDirectory(prefix="hf-elastic-text-") as scratch:
                train_family(family, self.tokenizer, Path(scratch), steps=steps, rows=rows, progress=False, **settings)
            return bits_per_byte(family, self.rows, self.lengths, measured)

        return self.runs.run(f"text-{self.size}-{name}-{seed}", action)


def run(options: argparse.Namespace) -> int:
    study = Study(options)
    scale = study.scale
    claims = CLAIMS if options.without_alone else [*CLAIMS, *ALONE_CLAIMS]
    report = Report("text_lm" if options.size == "5m" else "text_lm_gpu", claims)
    alone_steps = scale.family_steps // len(scale.budgets)
    untrained, family = study.untrained(), []
    split: dict[str, list[float]] = {} if options.without_alone else {name: [] for name in scale.budgets}
    for seed in options.seeds:
        family.append(study.distil("family", scale.family_steps, seed))
        for name, values in split.items():
            values.append(study.distil(f"split-{name}", alone_steps, seed, only=name)[name])
    ways = {
        "untrained": {name: [value] for name, value in untrained.items()},
        "family": {name: [found[name] for found in family] for name in untrained},
        "split": split,
    }
    _report(report, study, ways, {"seeds": options.seeds, "alone_steps": alone_steps})
    for name in SMALLER:
        mine = statistics.fmean(ways["family"][name])
        report.settle(UNTRAINED.format(name), mine / statistics.fmean(ways["untrained"][name]))
        if name in split:
            report.settle(SPLIT.format(name), mine / statistics.fmean(split[name]))
    report.settle(FULL, statistics.fmean(ways["family"]["full"]) / statistics.fmean(ways["untrained"]["full"]))
    study.runs.say_commits(report)
    return report.finish(options)


def _report(report: Report, study: Study, ways: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Sizes, text and machine, so that a reader can do it again; then bits per byte."""
    scale, corpus = study.scale, study.corpus
    costs = study.family().elastic_config.costs()
    held_out = "\n".join(corpus.held_out).encode()
    report.measure(
        "text to train on",
        "bytes",
        [sum(len(text.encode()) for text in corpus.train)],
        files=len(corpus.train),
        packages=corpus.packages,
        tokens=len(study.train),
        scale=asdict(scale),
    )
    report.measure(
        "text held out, measured",
        "bytes",
        [int(study.lengths[study.rows[:, 1:].long()].sum())],
        files=len(corpus.held_out),
        bytes=len(held_out),
        tokens=study.rows[:, 1:].numel(),
    )
    for name, packed in (("gzip -9", gzip.compress(held_out, 9)), ("xz", lzma.compress(held_out))):
        report.measure(
            f"{name} of all held-out files in one, bits per byte", "bits", [8 * len(packed) / len(held_out)]
        )
    for way, sizes in ways.items():
        for name, values in sizes.items():
            cost = {"active_params": costs[name].active_params, "total_params": costs[name].total_params}
            report.measure(f"{way}: {name}, bits per byte", "bits", values, **cost, **about)


def text_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = run_arguments(description)
    parser.add_argument(
        "--size",
        choices=tuple(SCALES),
        default="5m",
        help="parameters, and all that goes with them (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="end after so long; the same command goes on from there")
    parser.add_argument("--without-alone", action="store_true", help="leave out the runs of each size alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the data and budgets of distillation")
    return parser


if __name__ == "__main__":
    sys.exit(run(text_arguments(__doc__).parse_args()))
