"""The lab's tasks as ones that phase plans are measured on."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..errors import ElasticConfigError
from ..evaluation.plans import Task
from ..modeling_elastic import ElasticForCausalLM
from .tasks import get_task


def check_reads_lab(name: str, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse models that cannot know a task of the lab: those whose tokenizer reads its problems otherwise.

    Raises:
        `ElasticConfigError`: says which tasks there are.
    """
    task = get_task(name)
    text = next(task.problems("train", task.trained[0], 0)).prompt  # a copy may call its markers otherwise
    try:
        known = tokenizer.tokenize(text) == task.build_tokenizer().tokenize(text)
    except Exception:  # a fast tokenizer without an unknown token raises plain `Exception`
        known = False
    if not known:
        raise ElasticConfigError(
            f"{name} is a task of the embedded lab, and {where} has another tokenizer than its model. Give --data FILE with rows of your "
            "own, or --task NAME, a generating task of lm-eval such as gsm8k."
        )


@dataclass
class LabScore(Task):
    """What tasks of the lab have in common.

    Args:
        count (`int`, *optional*, defaults to 100): Held-out problems.
        batch_size (`int`, *optional*, defaults to 50): Problems generated together.
        seed (`int`, *optional*, defaults to 0): Which problems.
        metric (`str`, *optional*, defaults to `"code"`):
            Which rate is the accuracy: `"code"`, parts of answers (symbols, sentences), which falls gently where thinking is cut short, or
            `"exact"`, whole answers.
    """

    count: int = 100
    batch_size: int = 50
    seed: int = 0
    metric: str = "code"

    @property
    def size(self) -> int:
        """How long problems are."""
        raise NotImplementedError

    def score(
        self, model: ElasticForCausalLM, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, int, dict[str, float]]:
        found = get_task(self.name).evaluate(
            model,
            tokenizer,  # type: ignore[arg-type]
            size=self.size,
            count=self.count,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return self.metric, found.count, {"code": found.code, "exact": found.exact, "trace": found.trace}


@dataclass
class BookTask(LabScore):
    """The task `book` of the embedded lab, see [`LabScore`].

    Args:
        letters (`int`, *optional*, defaults to 12): Letters per problem.
    """

    letters: int = 12
    name: str = field(default="book", init=False)

    @property
    def size(self) -> int:
        return self.letters


@dataclass
class StoriesTask(LabScore):
    """The task `stories` of the embedded lab, see [`LabScore`].

    Args:
        people (`int`, *optional*, defaults to 5): People per story.
    """

    people: int = 5
    name: str = field(default="stories", init=False)

    @property
    def size(self) -> int:
        return self.people
