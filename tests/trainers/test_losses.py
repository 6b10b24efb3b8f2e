"""Distillation losses against references written from their definitions, and that full logits never exist."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from hf_elastic.trainers import chunked_divergence, divergence

BETAS, TEMPERATURES = [0.0, 0.3, 1.0], [1.0, 2.0]
TOKENS, STUDENT, TEACHER, VOCAB = 7, 5, 9, 11


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference(student: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    """One token, from the definitions: `KL(p || q) = sum p log(p / q)`, and GKD's eq. 1 (arXiv 2306.13649)."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if beta == 0.0:
        return kl(p, q)
    if beta == 1.0:
        return kl(q, p)
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(3, VOCAB, generator=generator) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_the_definition(beta, temperature):
    student, teacher = logits()
    student.requires_grad_()
    ours = divergence(student, teacher, beta=beta, temperature=temperature)
    assert ours.dtype == torch.float32
    ours.sum().backward()
    rows, targets = student.detach().double().tolist(), teacher.double().tolist()
    step = 1e-5  # central differences in float64: their error is about step^2 = 1e-10
    for i in range(3):
        expected = reference(rows[i], targets[i], beta, temperature)
        assert expected > 0.05
        # float32 rounding of a sum of 11 terms of order 1
        assert ours[i].item() == pytest.approx(expected, rel=1e-5)
        for j in range(VOCAB):
            up, down = list(rows[i]), list(rows[i])
            up[j] += step
            down[j] -= step
            slope = reference(up, targets[i], beta, temperature) - reference(down, targets[i], beta, temperature)
            assert student.grad[i, j].item() == pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_is_the_divergence_that_trl_computes(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = logits(1)
    theirs = gkd.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    ours = divergence(student, teacher, beta=beta, temperature=temperature).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the same float32 terms, summed in another order


def test_equal_distributions_diverge_by_nothing_whatever_is_added_to_the_logits():
    student, _ = logits()
    for beta in BETAS:
        # log_softmax of shifted logits differs in the last bits only
        assert divergence(student + 3, student, beta=beta).abs().max() < 1e-6


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = (x.bfloat16() for x in logits())
    whole = divergence(student.float(), teacher.float())
    assert torch.equal(divergence(student, teacher), whole)


class Heads:
    """Linear heads of different widths, which remember the most tokens they were called with."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = nn.Linear(STUDENT, VOCAB, bias=False), nn.Linear(TEACHER, VOCAB, bias=False)
        self.student_hidden = torch.randn(TOKENS, STUDENT, requires_grad=True)
        self.teacher_hidden = torch.randn(TOKENS, TEACHER)
        self.calls: list[int] = []
        for head in (self.student, self.teacher):
            head.register_forward_pre_hook(lambda module, args: self.calls.append(len(args[0])))

    def whole(self, beta: float, temperature: float) -> torch.Tensor:
        teacher = self.teacher(self.teacher_hidden).detach()
        return divergence(self.student(self.student_hidden), teacher, beta=beta, temperature=temperature).sum()

    def chunked(self, chunk_size: int, beta: float = 0.0, temperature: float = 1.0) -> torch.Tensor:
        return chunked_divergence(
            self.student_hidden,
            self.teacher_hidden,
            self.student,
            self.teacher,
            beta=beta,
            temperature=temperature,
            chunk_size=chunk_size,
        )


@pytest.mark.parametrize("chunk_size", [1, 3, TOKENS, TOKENS + 5])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_chunks_give_the_same_value_and_gradients(chunk_size, beta, temperature):
    ours, theirs = Heads(), Heads()
    expected = theirs.whole(beta, temperature)
    expected.backward()
    loss = ours.chunked(chunk_size, beta, temperature)
    loss.backward()
    # float32 sums in another order
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(ours.student_hidden.grad, theirs.student_hidden.grad, **close)
    torch.testing.assert_close(ours.student.weight.grad, theirs.student.weight.grad, **close)
    assert ours.teacher.weight.grad is None


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_no_more_than_a_chunk_of_tokens_ever_has_logits(chunk_size):
    heads = Heads()
    heads.chunked(chunk_size).backward()
    assert max(heads.calls) == chunk_size
    # forward of both, and again in backward: that nothing was kept in between is what saves the memory
    assert sum(heads.calls) == 4 * TOKENS


def test_logits_are_not_kept_for_backward():
    heads = Heads()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape[-1] if t.dim() else 0) or t, lambda t: t
    ):
        heads.chunked(2)
    assert kept
    assert VOCAB not in kept


def test_no_target_token_gives_zero_with_zero_gradients():
    heads = Heads()
    heads.student_hidden = torch.randn(0, STUDENT, requires_grad=True)
    heads.teacher_hidden = torch.randn(0, TEACHER)
    source = torch.ones(4, STUDENT, requires_grad=True)
    heads.student_hidden = source[torch.zeros(4, dtype=torch.bool)]  # as a batch whose labels are all masked
    loss = heads.chunked(3)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(source.grad, torch.zeros_like(source))


def test_message_of_the_config_names_the_option_and_its_range():
    from hf_elastic import ElasticConfigError
    from hf_elastic.trainers import ElasticDistillationConfig

    common = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    for field, value, allowed in [
        ("temperature", 0.0, "above 0"),
        ("temperature", float("inf"), "finite"),
        ("beta", 1.5, "[0, 1]"),
        ("beta", -0.1, "[0, 1]"),
        ("loss_chunk_size", 0, "at least 1"),
    ]:
        with pytest.raises(
            ElasticConfigError, match=re.escape(f"{field}={value} must be") + ".*" + re.escape(allowed)
        ):
            ElasticDistillationConfig(**common, **{field: value})
    for field in ("packing", "eval_packing", "padding_free"):
        with pytest.raises(ElasticConfigError, match="join documents.*set them to False"):
            ElasticDistillationConfig(**common, **{field: True})
