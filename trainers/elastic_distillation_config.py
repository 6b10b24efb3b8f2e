"""Configuration of [`ElasticDistillationTrainer`]."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from hf_elastic.errors import ElasticConfigError


@dataclass
class ElasticDistillationConfig(SFTConfig):
    r"""
    What [`ElasticDistillationTrainer`] adds to `trl.SFTConfig`.

    Args:
        budget_probabilities (`dict[str, float]`, *optional*):
            How often each budget is drawn, one per micro-batch; sums to 1. Defaults to all budgets of the model alike, the whole parent
            included (stage 1 of the papers; stage 2 draws the larger ones more often, 0.5 / 0.3 / 0.2).
        stages (`list[dict]`, *optional*):
            Stages of the run, each with `steps`, and optionally `budget_probabilities`, `max_length` and `learning_rate_scale`. They
            set `max_steps`.
        temperature (`float`, *optional*, defaults to 1.0): Of both distributions; above 0.
        beta (`float`, *optional*, defaults to 0.0): 0 is forward KL, 1 reverse KL, in between the generalised Jensen-Shannon divergence.
        loss_chunk_size (`int`, *optional*, defaults to 1024): Tokens that have logits at the same time.
        eval_budgets (`list[str]`, *optional*): Budgets to evaluate, defaults to all.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "budget_probabilities", "stages"]

    budget_probabilities: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How often each budget is drawn (name: probability); all alike by default."}
    )
    stages: list[Any] | str | None = field(
        default=None,
        metadata={"help": "Stages: dicts with steps, budget_probabilities, max_length, learning_rate_scale."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions, above 0."})
    beta: float = field(default=0.0, metadata={"help": "0 forward KL, 1 reverse KL, between: generalised JSD."})
    loss_chunk_size: int = field(default=1024, metadata={"help": "Tokens that have logits at the same time."})
    eval_budgets: list[str] | None = field(default=None, metadata={"help": "Budgets to evaluate, all by default."})

    def __post_init__(self) -> None:
        if isinstance(self.stages, str):  # from the command line; upstream reads JSON objects, not lists
            try:
                self.stages = json.loads(self.stages)
            except json.JSONDecodeError as error:
                raise ElasticConfigError(f"stages={self.stages!r} is not JSON: {error}.") from error
        super().__post_init__()
        if not self.temperature > 0:
            raise ElasticConfigError(f"temperature={self.temperature} must be above 0.")
        if not 0 <= self.beta <= 1:
            raise ElasticConfigError(f"beta={self.beta} must be in [0, 1].")
        if self.loss_chunk_size < 1:
            raise ElasticConfigError(f"loss_chunk_size={self.loss_chunk_size} must be at least 1.")
        if self.packing or self.padding_free:
            raise ElasticConfigError(
                "packing and padding_free join documents, whose Mamba states then leak into each other without the CUDA kernels; "
                "set them to False."
            )
        if isinstance(self.stages, list) and self.max_steps < 0:
            steps = [stage.get("steps") for stage in self.stages if isinstance(stage, dict)]
            counts = [count for count in steps if isinstance(count, int)]
            if len(counts) == len(self.stages) and all(
                count > 0 for count in counts
            ):  # what is wrong, the trainer says
                self.max_steps: int = sum(counts)
