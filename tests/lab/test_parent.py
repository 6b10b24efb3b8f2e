"""The parent of the lab: its configuration, its optimizer, its training and the shipped checkpoint."""

import copy
import doctest
import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

from hf_elastic.lab import parent as parent_module
from hf_elastic.lab.book import build_tokenizer, evaluate, problems, training_batches
from hf_elastic.lab.book_model import new_parent
from hf_elastic.lab.muon import Muon, orthogonalize
from hf_elastic.lab.parent import PARENT_DIR, load_parent, parent_config, train_parent


@pytest.fixture(scope="module")
def shipped():
    return load_parent()


def train_briefly(**options):
    return train_parent(**{"steps": 3, "batch_size": 4, "progress": False} | options)


# Configuration


def test_config_has_the_size_and_the_special_tokens_of_the_lab():
    config, tokenizer = parent_config(), build_tokenizer()
    assert NemotronHForCausalLM(config).num_parameters() == 141_856
    assert config.vocab_size == len(tokenizer)
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    assert [getattr(config, name) for name in ids] == [getattr(tokenizer, name) for name in ids]
    assert config.n_groups == 2


def test_config_overrides():
    config = parent_config(hidden_size=16, hybrid_override_pattern="M*-")
    assert (config.hidden_size, config.hybrid_override_pattern) == (16, "M*-")


# Muon


def newton_schulz_reference(matrix):
    """The iteration on the singular values alone, in float64: the polynomial acts on each of them by itself."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u, s, vh


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (8, 32, 48)], ids=str)
def test_orthogonalize_agrees_with_svd(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = newton_schulz_reference(matrix)
    # Float32 rounding, 6e-8 of entries below 1.2, grows at most by the slope at zero over five rounds, 3.4445^5 = 485.
    torch.testing.assert_close(orthogonalize(matrix).double(), u * s.unsqueeze(-2) @ vh, rtol=0, atol=3e-5)
    # Nearly orthogonal, which the argument was not.
    assert s.min() > 0.68
    assert s.max() < 1.21
    assert torch.linalg.svdvals(matrix).amax() > 2


def test_orthogonalize_treats_every_matrix_of_a_batch_on_its_own():
    matrices = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3]).view(
        3, 1, 1
    )
    separate = torch.stack([orthogonalize(matrix) for matrix in matrices])
    # Batched products may add up in another order.
    torch.testing.assert_close(orthogonalize(matrices), separate, rtol=0, atol=3e-5)


def test_orthogonalize_keeps_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_muon_steps_like_the_one_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = copy.deepcopy(ours)
    start = ours.detach().clone()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    optimizers = [Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (ours - start).norm()
    # Theirs iterates in bfloat16, whose 8 bits leave an error of about a hundredth.
    assert (ours - theirs).norm() / moved < 0.03
    assert moved > 1


def test_muon_steps_a_batch_like_its_matrices():
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(9, 4, 6, generator=generator), torch.randn(9, 4, 6, generator=generator)
    batch = torch.nn.Parameter(start.clone())
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    batch.grad = grad
    for matrix, matrix_grad in zip(matrices, grad, strict=True):
        matrix.grad = matrix_grad
    for parameters in ([batch], matrices):
        Muon(parameters, lr=0.1).step()
    assert not torch.equal(batch, start)
    # Batched products may add up in another order.
    torch.testing.assert_close(batch.detach(), torch.stack(matrices).detach(), rtol=0, atol=1e-5)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"two or more dimensions, got the shapes \[\(3,\)\]"):
        Muon([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, 3))], lr=0.1)


def test_every_parameter_has_the_optimizer_meant_for_it():
    model = NemotronHForCausalLM(parent_config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = (
        {names.pop(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in parent_module._optimizers(model)
    )
    assert not names
    kinds = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert {name.removesuffix(".weight").split(".")[-1] for name in muon} == set(kinds)
    assert {name.removesuffix(".weight").split(".")[-1] for name in adamw} == {
        "embeddings", "lm_head", "gate", "conv1d", "bias", "norm", "norm_f", "A_log", "D", "dt_bias"
    }  # fmt: skip


# Training


def test_learning_rate_warms_up_stays_and_decays():
    factors = [parent_module._learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50)
    assert factors[24] == pytest.approx(1 / 2)
    assert factors[49:600] == [1.0] * 551
    assert factors[799] == pytest.approx(0.51)
    assert factors[999] == pytest.approx(0.02)
    assert factors[599:] == sorted(factors[599:], reverse=True)


def test_training_is_deterministic_and_depends_on_the_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, history = train_briefly()
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used"
    # Another state of the global generator must not matter.
    torch.manual_seed(2)
    again, history_again = train_briefly()
    other, _ = train_briefly(seed=1)
    weights, weights_again, weights_other = (model.state_dict() for model in (one, again, other))
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert history == history_again
    assert [record["step"] for record in history] == [1, 2, 3]
    assert not torch.equal(weights["lm_head.weight"], weights_other["lm_head.weight"])


def test_training_moves_every_weight():
    start = new_parent(0).state_dict()
    # More examples than elsewhere, so that every expert gets some tokens.
    trained = train_briefly(batch_size=16)[0].state_dict()
    still = {name for name in start if torch.equal(start[name], trained[name])}
    # The correction bias is a buffer that only a load-balancing rule, which is not used here, would move.
    assert still == {name for name in start if name.endswith("e_score_correction_bias")}


def test_training_lowers_the_loss_and_logs():
    records = []
    model, history = train_briefly(steps=5, batch_size=16, log=records.append)
    assert records == history
    assert history[-1]["loss"] < history[0]["loss"]
    assert not model.training


def test_training_uses_the_batches_of_its_seed():
    model, batches = new_parent(1), training_batches(build_tokenizer(), 1, 4)
    assert train_briefly(seed=1)[1][0]["loss"] == model(**next(batches)).loss.item()


def test_training_follows_the_learning_rate(monkeypatch):
    # With a rate of zero after the first step, further steps change nothing.
    monkeypatch.setattr(parent_module, "_learning_rate_factor", lambda step, steps: float(step == 0))
    one, three = (train_briefly(steps=steps)[0].state_dict() for steps in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], new_parent(0).lm_head.weight)


def test_training_clips_the_gradient(monkeypatch):
    # Clipped to nothing it moves no weight that does not decay.
    monkeypatch.setattr(parent_module, "_CLIP_NORM", 0.0)
    start, trained = new_parent(0), train_briefly()[0]
    assert torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_training_needs_a_step():
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        train_briefly(steps=0)


def test_command_saves_a_checkpoint_and_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(parent_module, "_EVALUATED_PROBLEMS", 3)
    parent_module.main(["--output", str(tmp_path), "--seed", "5", "--steps", "1"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["seed"], record["steps"], record["num_parameters"]) == (5, 1, 141_856)
    assert [(row["letters"], row["thinking"], row["count"]) for row in record["evaluation"]] == [
        (letters, thinking, 3) for letters in (4, 8, 12) for thinking in (True, False)
    ]
    assert [entry["step"] for entry in record["history"]] == [1]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    trained = train_parent(seed=5, steps=1, progress=False)[0].state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == build_tokenizer().get_vocab()


# The shipped checkpoint


def test_shipped_parent_solves_long_problems_by_thinking(shipped):
    assert evaluate(*shipped, letters=12, count=24).exact >= 0.95
    # Nor does it solve them at once, so the thinking is what does it.
    assert evaluate(*shipped, letters=12, count=24, thinking=False).exact == 0


def test_shipped_parent_solves_problems_of_different_lengths_in_a_batch(shipped):
    assert evaluate(*shipped, letters=(4, 12), count=24).exact >= 0.95


def test_shipped_parent_is_what_its_record_and_the_code_say(shipped):
    model, tokenizer = shipped
    record = json.loads((PARENT_DIR / "training.json").read_text())
    assert (record["steps"], record["num_parameters"]) == (1000, model.num_parameters())
    exact = {(row["letters"], row["thinking"]): row["exact"] for row in record["evaluation"]}
    assert exact[12, True] >= 0.98
    assert set(exact) == {(letters, thinking) for letters in (4, 8, 12) for thinking in (True, False)}
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()

    saved, made = (config.to_dict() for config in (model.config, parent_config()))
    for name in ("architectures", "dtype", "_name_or_path", "transformers_version"):
        saved.pop(name, None), made.pop(name, None)
    assert saved == made


def test_shipped_parent_generates_with_its_own_settings(shipped):
    model, tokenizer = shipped
    assert model.dtype == torch.float32
    assert not model.training
    assert model.generation_config.max_new_tokens == new_parent(0).generation_config.max_new_tokens
    short, long = (next(problems("heldout", letters, seed=0)) for letters in (4, 12))
    inputs = tokenizer([short.prompt + "<think>", long.prompt + "<think>"], padding=True, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**inputs))
    assert [text.replace("<pad>", "") for text in texts] == [short.text + "<eos>", long.text + "<eos>"]


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in PARENT_DIR.iterdir()) < 2_000_000


@pytest.mark.parametrize("name", ["task", "book", "parent", "stories"])
def test_docstring_examples(name):
    module = importlib.import_module(f"hf_elastic.lab.{name}")
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(parser=MarkdownParser()).find(module, module.__name__):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert name == "book" or runner.tries > 0


class MarkdownParser(doctest.DocTestParser):
    """Reads examples in fenced blocks, whose closing fence would otherwise count as output."""

    def parse(self, string, name="<string>"):
        return super().parse(string.replace("```", ""), name)
