"""Distillation losses, in chunks of tokens so that the full logits of student and teacher never exist.

Pure functions of tensors; shapes: T target tokens, d and D hidden width of student and teacher, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps hidden states `(n, width)` to logits `(n, V)`."""


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Divergence of the student from the teacher per token.

    `beta=0` is the forward divergence `KL(teacher || student)` (arXiv 2511.16664, eq. 14), `beta=1` the reverse one, and in between the
    generalised Jensen-Shannon divergence `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`
    (arXiv 2306.13649, eq. 1). It is not multiplied by `temperature ** 2`.

    Args:
        student_logits (`torch.Tensor`): `(n, V)`.
        teacher_logits (`torch.Tensor`): `(n, V)`.
        beta (`float`, *optional*, defaults to 0.0): In [0, 1].
        temperature (`float`, *optional*, defaults to 1.0): Divides both logits; above 0.

    Returns:
        `torch.Tensor`: float32 of shape `(n,)`.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixture = torch.logsumexp(torch.stack([teacher + math.log(beta), student + math.log1p(-beta)]), dim=0)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)` over the last dimension."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def chunked_divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Sum of [`divergence`] over tokens, of which only `chunk_size` have logits at any time; backward makes them again.

    Args:
        student_hidden (`torch.Tensor`): `(T, d)`; gradients flow into it and into the parameters of `student_head`.
        teacher_hidden (`torch.Tensor`): `(T, D)`, without gradient.
        student_head, teacher_head: To logits over the same vocabulary.
        chunk_size (`int`, *optional*, defaults to 1024): Tokens at a time, at least 1.

    Returns:
        `torch.Tensor`: float32 scalar.
    """

    def chunk_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return divergence(student_head(student), teacher_logits, beta=beta, temperature=temperature).sum()

    total = student_hidden.sum(dtype=torch.float32) * 0.0  # a batch without targets has a gradient, of zero
    for start in range(0, len(student_hidden), chunk_size):
        student, teacher = student_hidden[start : start + chunk_size], teacher_hidden[start : start + chunk_size]
        # Heads draw no random numbers; saving the generators' states for each chunk would be for nothing.
        total = total + checkpoint(chunk_loss, student, teacher, use_reentrant=False, preserve_rng_state=False)
    return total


@torch.no_grad()
def summed_entropy(hidden: torch.Tensor, head: Head, *, chunk_size: int = 1024) -> torch.Tensor:
    """Sum over tokens of the entropy of the distributions that a head makes of hidden states `(T, D)`, in nats; a float32 scalar."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), chunk_size):
        log_p = F.log_softmax(head(hidden[start : start + chunk_size]).float(), dim=-1)
        total = total - (log_p.exp() * log_p).sum()
    return total


HIDDEN_LOSSES = ("cosine", "mse")


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, *, kind: str = "cosine") -> torch.Tensor:
    r"""
    Distance per token between a hidden state of the student, s, and the first d channels of the teacher's, t.

    `"cosine"` is `1 - s.t / (|s| |t|)`, `"mse"` is `|s - t|^2 / |t|^2`, the mean square error in units of the teacher's mean square. Neither
    has a unit: residual streams grow with depth, and without dividing by their size the last layers would be all of the loss. Cosine
    leaves the student its scale, which the next norm takes out again.

    No projection: the parent is sorted, so channel i of a submodel is channel i of the parent.

    Args:
        student (`torch.Tensor`): `(T, d)`.
        teacher (`torch.Tensor`): `(T, D)` with `D >= d`, without gradient.
        kind (`str`, *optional*, defaults to `"cosine"`): One of `HIDDEN_LOSSES`.

    Returns:
        `torch.Tensor`: float32 of shape `(T,)`, at least 0.
    """
    s, t = student.float(), teacher[:, : student.shape[1]].float()
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(s, t, dim=-1)
    return (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def summed_hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], *, kind: str = "cosine"
) -> torch.Tensor:
    """Sum over target tokens of the mean over layers of [`hidden_distance`]. Float32 copies of the states only exist for one layer at a
    time; backward makes them again.

    Args:
        student (`Sequence[torch.Tensor]`): L tensors `(T, d)`; at least one.
        teacher (`Sequence[torch.Tensor]`): L tensors `(T, D)`, without gradient.

    Returns:
        `torch.Tensor`: float32 scalar.
    """

    def layer_sum(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return hidden_distance(s, t, kind=kind).sum()

    sums = [
        checkpoint(layer_sum, s, t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(sums).mean()
