"""A smaller budget drafts, the active one verifies: what comes out is what the active one alone gives.

Passes over several tokens and over one differ in the last bits of a float32 logit (about 5e-6 here), so that greedy texts are compared
token for token only where no two best tokens are nearly tied; `plain` checks that of every text it gives.
"""

from __future__ import annotations

import pytest
import torch
from cases import VOCAB, nemotron, randomize
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    NemotronHForCausalLM,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from hf_elastic import ElasticForCausalLM, UnknownBudgetError
from hf_elastic.errors import SpeculationError
from hf_elastic.generation import PhasePlan, snapshots, speculation

SETTINGS = {"max_new_tokens": 18, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
DRAFTERS = {"nano3": ["small", "large", {"expert_ffn": 12}], "granite": ["small", "large", {"experts_per_token": 2}]}
"""From a drafter of another depth that is nearly always wrong to one that is often right."""


@pytest.fixture(scope="module")
def families(family_folder):
    models = {}

    def get(name: str):
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(family_folder(name))
        models[name].set_budget(None)
        return models[name]

    return get


def prompt(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def plain(model, ids, **kwargs):
    """What the active budget alone gives, and a check that no choice was a near tie."""
    out = model.generate(ids, **SETTINGS | {"output_logits": True} | kwargs)
    best = torch.cat(out.logits).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3
    return out


def speculative(model, ids, draft="small", **kwargs):
    return model.generate(ids, draft_budget=draft, **SETTINGS | kwargs)


# -- greedy: the same tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_the_verifiers(name, families):
    """For every drafter, number of drafts, and verifier, among them one that is itself smaller than the parent. Counts add up."""
    model, shares = families(name), []
    ids = prompt(1)
    alone = plain(model, ids, output_scores=True)
    for draft, k in zip(DRAFTERS[name], (4, 7, 1), strict=True):
        out = speculative(model, ids, draft, num_draft_tokens=k, output_logits=True, output_scores=True)
        assert torch.equal(out.sequences, alone.sequences)
        for kind in ("logits", "scores"):
            torch.testing.assert_close(torch.cat(out[kind]), torch.cat(alone[kind]), atol=2e-5, rtol=0)
        # The prompt gives one token, every pass one, and the accepted drafts are the rest.
        assert out.accepted + out.passes + 1 == SETTINGS["max_new_tokens"]
        assert out.accepted <= out.drafted <= k * out.passes
        assert model.budget == "full"
        shares.append(out.acceptance)
    assert min(shares) < 0.15 < max(shares)  # both ways of going on were taken
    with model.at("medium"):
        alone = plain(model, ids)
        assert torch.equal(speculative(model, ids).sequences, alone.sequences)
        assert model.budget == "medium"


def test_a_drafter_that_is_always_right(families):
    """One that computes what the verifier does has everything accepted: nothing is put back, and passes are as few as can be."""
    model = families("nano3")
    full = model.submodel
    twin = model.elastic_config.resolve({"expert_ffn": 12})
    parent = dict(model.named_parameters())
    saved = {n: p.clone() for n, p in parent.items() if n.endswith(("experts.up_proj", "experts.down_proj"))}
    for name in saved:  # what the larger one adds is nothing
        (parent[name][:, 12:] if "up_proj" in name else parent[name][:, :, 12:]).zero_()
    try:
        out = speculative(model, prompt(2), twin, num_draft_tokens=4, max_new_tokens=26)
        assert torch.equal(out.sequences, plain(model, prompt(2), max_new_tokens=26).sequences)
        assert (out.drafted, out.accepted, out.passes, out.rereads) == (20, 20, 5, 0)
        assert out.acceptance == 1
        assert model.submodel == full
    finally:
        for name, values in saved.items():
            parent[name].copy_(values)


@pytest.mark.parametrize("whose", ["verifier", "drafter"])
def test_states_are_put_back(whose, families, monkeypatch):
    """With SSM and convolution states that are not put back the text is another one (verifier), or drafts are worse (drafter)."""
    model, ids, caches = families("granite"), prompt(1), []
    right = speculative(model, ids, {"experts_per_token": 2}, num_draft_tokens=6)
    make, restore = snapshots.DynamicCache, snapshots.Snapshot.restore

    def made(**kwargs):
        caches.append(make(**kwargs))
        return caches[-1]

    def idle(self, cache):
        states = self.states if cache is not caches[whose == "drafter"] else [{} for _ in self.states]
        restore(snapshots.Snapshot(self.tokens, states), cache)

    monkeypatch.setattr(snapshots, "DynamicCache", made)
    monkeypatch.setattr(snapshots.Snapshot, "restore", idle)
    wrong = speculative(model, ids, {"experts_per_token": 2}, num_draft_tokens=6)
    assert len(caches) == 2
    assert torch.equal(wrong.sequences, right.sequences) == (whose == "drafter")
    if whose == "drafter":
        assert wrong.accepted < right.accepted


def test_rereads_are_bounded(families, monkeypatch):
    """A drafter that is always wrong: accepted tokens that are not in the states are read again, and not ever more of them."""
    model, ids, lengths = families("nano3"), prompt(1), []
    monkeypatch.setattr(speculation, "MOST_REREAD", 5)
    read = snapshots.Reader.read

    def counting(self, text, count=1):
        lengths.append(text.shape[1] - self.tokens)
        return read(self, text, count)

    monkeypatch.setattr(snapshots.Reader, "read", counting)
    out = speculative(model, ids, num_draft_tokens=4)
    assert out.rereads >= 3
    assert max(lengths) <= 5 + 4
    assert torch.equal(out.sequences, plain(model, ids).sequences)


def test_the_scans_clamp_does_not_matter(parent):
    """Upstream's scan clamps time steps at `time_step_min` and its steps do not: here nearly all are below, and still nothing differs."""
    stock = parent("nano2")
    stock.config.time_step_min = 1.5
    model = ElasticForCausalLM.from_pretrained(None, config=stock.config, state_dict=stock.state_dict())
    assert model.model.layers[0].mixer.time_step_limit[0] == 1.5
    alone = plain(model, prompt(3), output_logits=True)
    out = speculative(model, prompt(3), {"ffn": 32}, output_logits=True)
    assert out.accepted
    torch.testing.assert_close(torch.cat(out.logits), torch.cat(alone.logits), atol=2e-5, rtol=0)
    assert model.model.layers[0].mixer.time_step_limit[0] == 1.5
    assert model.model.layers[0].mixer.chunk_size == 8


# -- ends, processors, streams -----------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


class Third(StoppingCriteria):
    """Stops after the third token that is divisible by 3."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([int((input_ids[0, 9:] % 3 == 0).sum()) >= 3])


class NoTokenTwice(LogitsProcessor):
    """Depends on the whole text, so that a processor which saw the wrong one would show."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0], -1e9)


def test_ends_processors_and_streams(families):
    """All as upstream does it, wherever in an accepted run it happens; several lengths of runs are tried."""
    model, ids, often = families("nano3"), prompt(1), {"expert_ffn": 12}
    text = plain(model, ids).sequences[0].tolist()
    for new in (1, 6, 7):
        out = speculative(model, ids, often, num_draft_tokens=4, max_new_tokens=new)
        assert out.sequences[0].tolist() == text[: 9 + new]
    for k, settings in (
        (5, {"eos_token_id": text[9 + 6]}),
        (2, {"eos_token_id": [text[9 + 3], text[9 + 9]]}),
        (5, {"stopping_criteria": [Third()]}),
        (2, {"repetition_penalty": 1.7, "min_new_tokens": 9, "eos_token_id": text[9 + 1]}),
        (5, {"logits_processor": LogitsProcessorList([NoTokenTwice()])}),
        (2, {"prefill_chunk_size": 4, "attention_mask": torch.tensor([[0] * 3 + [1] * 6])}),
    ):
        theirs, ours = Collector(), Collector()
        alone = model.generate(ids, streamer=theirs, **SETTINGS | {"max_new_tokens": 12} | settings).sequences
        out = speculative(model, ids, often, num_draft_tokens=k, streamer=ours, max_new_tokens=12, **settings)
        assert torch.equal(out.sequences, alone)
        assert ours.got == theirs.got
        assert ours.ended == theirs.ended == 1
    assert torch.equal(
        model.generate(ids, None, draft_budget="small", **SETTINGS | {"return_dict_in_generate": False}),
        plain(model, ids).sequences,
    )


def test_stop_strings(families):
    from hf_elastic.lab.parent import load_parent

    stock, tokenizer = load_parent()
    model = ElasticForCausalLM.from_pretrained(None, config=stock.config, state_dict=stock.state_dict())
    inputs = tokenizer("^a6b-1c-5d-4><think>", return_tensors="pt")
    options = {"stop_strings": ["</think>b"], "tokenizer": tokenizer, "do_sample": False, "max_new_tokens": 40}
    out = model.generate(**inputs, draft_budget={"expert_ffn": 24}, return_dict_in_generate=True, **options)
    assert tokenizer.decode(out.sequences[0]) == "^a6b-1c-5d-4><think>a6b6-1=5c5-5=0d0-4=6</think>b"
    assert 0.3 < out.acceptance <= 1


# -- sampling: the same distribution -----------------------------------------------------------------------------------


def _random(seed: int, *shape: int) -> torch.Tensor:
    """Distributions with zeros in them, as top-k leaves them; the first token is always possible."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) * (
        torch.rand(shape, generator=generator) < 0.6
    )
    weights[..., 0] += 0.1
    return weights / weights.sum(-1, keepdim=True)


def _outcome(drafted, proposed, wanted, chances, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda p: torch.tensor(chances, dtype=p.dtype))
        return speculation.accept(torch.tensor(drafted), proposed, wanted, True)


def test_the_rule_gives_the_wanted_distribution(monkeypatch):
    """Exactly, by adding up every draft of two tokens: P(first), and P(second | first) for the firsts that were accepted.

    Tables do not depend on what was drafted before, which the rule does not see either. How likely a draft is kept is found by trying
    chances just below and above min(1, p / q).
    """
    for seed in range(5):
        q, p, size = _random(seed, 2, 6), _random(seed + 100, 3, 6), 6
        proposed = [q[:1], q[1:]]
        first, both = torch.zeros(size, dtype=p.dtype), torch.zeros(size, size, dtype=p.dtype)
        for a in range(size):
            for b in range(size):
                weight = q[0, a] * q[1, b]
                if weight == 0:
                    continue
                keep = [min(1.0, float(p[i, x] / q[i, x])) for i, x in enumerate((a, b))]
                for i, share in enumerate(keep):
                    chances = [0.0 if keep[0] > 0 else 1.0, 0.0]
                    if 1e-9 < share < 1 and (i == 0 or keep[0] > 0):
                        chances[i] = share * (1 - 1e-9)
                        assert _outcome([a, b], proposed, p, chances, monkeypatch)[0] > i
                        chances[i] = share * (1 + 1e-9)
                        assert _outcome([a, b], proposed, p, chances, monkeypatch)[0] == i
                kept, rest = _outcome([a, b], proposed, p, [1 - 1e-12 if keep[0] < 1 else 0.0, 0.0], monkeypatch)
                if keep[0] < 1:
                    assert kept == 0
                    first += weight * (1 - keep[0]) * rest[0]
                first[a] += weight * keep[0]
                if keep[0] == 0:
                    continue
                both[a, b] += weight * keep[0] * keep[1]
                if keep[1] < 1:
                    kept, rest = _outcome([a, b], proposed, p, [0.0, 1 - 1e-12], monkeypatch)
                    assert kept == 1
                    both[a] += weight * keep[0] * (1 - keep[1]) * rest[0]
                if keep[1] > 0:
                    kept, rest = _outcome([a, b], proposed, p, [0.0, 0.0], monkeypatch)
                    assert kept == 2
                    assert torch.equal(rest, p[2:])
        torch.testing.assert_close(first, p[0], atol=1e-9, rtol=0)
        accepted = both.sum(1, keepdim=True)
        rows = accepted[:, 0] > 0
        torch.testing.assert_close((both / accepted)[rows], p[1].expand(int(rows.sum()), -1), atol=1e-9, rtol=0)


def test_samples_are_distributed_as_the_verifiers():
    """Three tokens, the last two of them drafted, against the exact probabilities of all texts that top-k 2 leaves; the drafter's differ."""
    stock = NemotronHForCausalLM(nemotron("M*")).eval()
    randomize(stock, 5)
    model = ElasticForCausalLM.from_pretrained(None, config=stock.config, state_dict=stock.state_dict())
    ids, heat, runs = prompt(4, 6), 2.0, 120

    def exact(text: torch.Tensor, tokens: int = 3) -> dict[tuple[int, ...], float]:
        if not tokens:
            return {(): 1.0}
        best = (model(input_ids=text, use_cache=False).logits[0, -1] / heat).topk(2)
        found = {}
        for token, p in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
            after = exact(torch.cat([text, torch.tensor([[token]])], dim=1), tokens - 1)
            found |= {(token, *rest): p * q for rest, q in after.items()}
        return found

    wanted = exact(ids)
    with model.at({"mamba_heads": 8}):
        drafters = exact(ids)
    torch.manual_seed(0)
    counts = dict.fromkeys(wanted, 0)
    drafted = accepted = 0
    for _ in range(runs):
        settings = {"do_sample": True, "top_k": 2, "temperature": heat, "max_new_tokens": 4}
        out = speculative(model, ids, {"mamba_heads": 8}, num_draft_tokens=2, **settings)
        counts[tuple(out.sequences[0, 6:9].tolist())] += 1
        drafted, accepted = drafted + out.drafted, accepted + out.accepted
    assert 0.2 < accepted / drafted < 0.8

    def distance(expected: dict[tuple[int, ...], float]) -> float:
        """Chi-square, cells of fewer than 5 taken as if 5 were expected."""
        cells = {text: runs * expected.get(text, 0.0) for text in wanted}
        return sum((counts[text] - cell) ** 2 / max(cell, 5.0) for text, cell in cells.items())

    assert distance(wanted) < 24.3  # 7 degrees of freedom: exceeded once in 1000 seeds
    assert distance(drafters) > 60


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"draft_budget": "full"},
            "draft_budget='full' must be smaller than the active budget, 'full'.*large, medium, small",
        ),
        ({"num_draft_tokens": 0}, "num_draft_tokens=0 must be a whole number of at least 1"),
        ({"num_draft_tokens": True}, "num_draft_tokens=True must be"),
        ({"draft_budget": None, "num_draft_tokens": 3}, "num_draft_tokens=3 needs draft_budget"),
        ({"phase_plan": PhasePlan("small", "large")}, "phase_plan= cannot be used together"),
        ({"custom_generate": print}, "custom_generate= cannot be used together"),
        ({"num_beams": 2}, "not with beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "not with assisted_generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 cannot be used.*must be 1"),
        ({"use_cache": False}, "use_cache=False cannot be used.*must be True"),
        ({"cache_implementation": "static"}, "cache_implementation='static' cannot be used"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 cannot be used"),
        ({"output_attentions": True}, "output_attentions= cannot be used"),
        ({"output_hidden_states": True}, "output_hidden_states= cannot be used"),
        ({"past_key_values": object()}, "past_key_values= cannot be used"),
        ({"inputs_embeds": torch.zeros(1, 3, 48), "inputs": None}, "inputs_embeds= cannot be used"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.long)}, "one sequence at a time, not a batch of 2"),
    ],
)
def test_what_is_refused(kwargs, message, families, monkeypatch):
    model, streamer = families("nano3"), Collector()
    arguments = {"inputs": prompt(0), "draft_budget": "small", "streamer": streamer, **SETTINGS} | kwargs
    monkeypatch.setattr(type(model), "forward", None)  # nothing may run
    with pytest.raises(SpeculationError, match=message):
        model.generate(**arguments)
    assert model.budget == "full"
    assert not streamer.got


def test_budgets_and_modes_that_are_refused(families):
    model = families("nano3")
    with model.at("small"), pytest.raises(SpeculationError, match="active budget, 'small', and nest.*that do: none"):
        speculative(model, prompt(0), "large")
    with pytest.raises(UnknownBudgetError, match="Did you mean 'small'"):
        speculative(model, prompt(0), "smal")
    model.train()
    try:
        with pytest.raises(SpeculationError, match="evaluation mode"):
            speculative(model, prompt(0))
    finally:
        model.eval()
