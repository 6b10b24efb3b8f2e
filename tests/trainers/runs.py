"""A tokenizer, rows and short runs for the tests of the trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from cases import BUDGETS, VOCAB, build_parent
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer

PAD, EOS = 0, 1
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'][0] + '>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, as many as the tiny parents have."""
    special = ["<pad>", "<eos>", "<u>", "<a>"]
    characters = [chr(code) for code in range(ord(" "), ord(" ") + VOCAB - len(special))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special + characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<u>", "<a>"]
    )
    made.chat_template = TEMPLATE
    return made


def family(name: str = "nano3", seed: int = 0) -> ElasticForCausalLM:
    return elastify(build_parent(name, seed), budgets=BUDGETS[name], sort=False)


def rows(count: int = 12, seed: int = 0, shortest: int = 5, longest: int = 20) -> Dataset:
    """Pre-tokenised rows of different lengths."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"input_ids": [rng.randrange(2, VOCAB) for _ in range(rng.randint(shortest, longest))]} for _ in range(count)]
    )


def config(folder: Path, **fields: Any) -> ElasticDistillationConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_length": 64,
    }
    return ElasticDistillationConfig(**{**defaults, **fields})


def trainer(
    folder: Path, model: ElasticForCausalLM | None = None, *, dataset: Any = None, callbacks: Any = None, **fields: Any
) -> ElasticDistillationTrainer:
    given = {key: fields.pop(key) for key in ("teacher_model", "eval_dataset", "peft_config") if key in fields}
    return ElasticDistillationTrainer(
        model=family() if model is None else model,
        args=config(folder, **fields),
        train_dataset=rows() if dataset is None else dataset,
        processing_class=tokenizer(),
        callbacks=callbacks,
        **given,
    )


class Recorder(TrainerCallback):
    """Remembers what each step was given: batches as they reach the loss, budgets, learning rates."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, dict[str, torch.Tensor]]]] = []
        self.rates: list[float] = []

    def watch(self, trainer: ElasticDistillationTrainer) -> Recorder:
        trainer.add_callback(self)
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
            if trainer.model.training:
                self.steps[-1].append((trainer._budget_name, {key: t.clone() for key, t in inputs.items()}))
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss  # type: ignore[method-assign]
        return self

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
