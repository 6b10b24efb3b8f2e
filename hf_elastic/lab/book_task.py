"""The lab's task as one that phase plans are measured on."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..errors import ElasticConfigError
from ..evaluation.plans import Task
from ..modeling_elastic import ElasticForCausalLM
from .book import evaluate

_TEXT = "^a4b+3c-1>"


def check_reads_book(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse models that cannot know the task: those whose tokenizer does not read its problems character by character.

    Raises:
        `ElasticConfigError`: says which tasks there are.
    """
    try:
        known = tokenizer.tokenize(_TEXT) == list(_TEXT)
    except Exception:  # a fast tokenizer without an unknown token raises plain `Exception`
        known = False
    if not known:
        raise ElasticConfigError(
            f"book is the task of the embedded lab, and {where} has another tokenizer than the lab's models. Give --data FILE with rows of your "
            "own, or --task NAME, a generating task of lm-eval such as gsm8k."
        )


@dataclass
class BookTask(Task):
    """The embedded lab's task.

    Args:
        letters (`int`, *optional*, defaults to 12): Letters per problem.
        count (`int`, *optional*, defaults to 100): Held-out problems.
        batch_size (`int`, *optional*, defaults to 50): Problems generated together.
        seed (`int`, *optional*, defaults to 0): Which problems.
        metric (`str`, *optional*, defaults to `"code"`):
            Which rate is the accuracy: `"code"`, symbols of answers, which falls gently where thinking is cut short, or `"exact"`, whole answers.
    """

    letters: int = 12
    count: int = 100
    batch_size: int = 50
    seed: int = 0
    metric: str = "code"
    name: str = field(default="book", init=False)

    def score(
        self, model: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, int, dict[str, float]]:
        options = {"letters": self.letters, "count": self.count, "batch_size": self.batch_size, "seed": self.seed}
        result = evaluate(model, tokenizer, **options)  # type: ignore[arg-type]
        return self.metric, result.count, {"code": result.code, "exact": result.exact, "trace": result.trace}
