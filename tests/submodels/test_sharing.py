"""One family, several users: sizes of their own, threads and tasks at different budgets, caches that are not mixed up."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from cases import CASES, IDS
from compare import assert_same_logits, assert_same_weights, logits
from others import another_thread, exchange
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from hf_elastic import BusyError, HandoverError, HFElasticError, Phase, PhasePlan, UnknownBudgetError

load = AutoModelForCausalLM.from_pretrained
NAMES = ["nano3", "granite"]
SIZES = ["large", "medium", "small", None]
each_model = pytest.mark.parametrize("name", NAMES)
LONG = bool(os.environ.get("HF_ELASTIC_LONG"))  # 200 rounds in each of eight threads, a minute; CI makes do with 25
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def storages(model):
    return {t.untyped_storage().data_ptr() for t in model.state_dict().values()}


# A size as a model of its own


@each_model
@pytest.mark.parametrize("budget", SIZES)
def test_a_size_is_its_slice_whatever_the_family_is_set_to(name, budget, family, sliced, ids):
    model, expected = family(name), sliced(name, budget)
    size = model.sized(budget)
    for other in (*SIZES, "small"):
        model.set_budget(other)
        assert_same_weights(size, expected)
        assert_same_logits(logits(size, ids), logits(expected, ids))
        assert torch.equal(size.generate(ids[:, :7], **SETTINGS), expected.generate(ids[:, :7], **SETTINGS))
        assert size.budget == expected.budget
        assert size.budgets == expected.budgets
        assert size.config.to_diff_dict() == expected.config.to_diff_dict()
        assert size.num_parameters() == expected.num_parameters()
        assert isinstance(size, model.architecture.causal_class)
        assert model.budget == ("full" if other is None else other)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_sizes_along_every_axis(case, checkpoint, ids):
    model = load(checkpoint(case.parent))
    size = model.sized(case.submodel)
    with model.at(case.submodel):
        assert_same_weights(dict(model.state_dict()), size)
        assert torch.equal(logits(model, ids), logits(size, ids))


@each_model
def test_a_size_costs_no_memory_beyond_the_copies_of_the_family(name, family):
    model = family(name)
    with model.at("small"):
        owned = storages(model)
    owned |= storages(model)
    for _ in range(2):
        assert storages(model.sized("small")) <= owned
    assert storages(model.sized(None)) == storages(model)


@each_model
def test_sizes_keep_their_settings_to_themselves(name, family):
    model = family(name)
    size, other = model.sized("small"), model.sized("small")
    size.config.use_cache = False
    size.generation_config.max_new_tokens = 3
    size.set_attn_implementation("eager")
    model.set_budget("small")
    for one in (model, other):
        assert one.config.use_cache
        assert one.generation_config.max_new_tokens is None
        assert one.config._attn_implementation != "eager"
    hooked = []
    size.model.layers[0].register_forward_hook(lambda *args: hooked.append(1))
    for one in (model, other):
        one(torch.tensor([[5, 6]]))
    assert not hooked
    size(torch.tensor([[5, 6]]))
    assert hooked


@each_model
def test_a_size_nests_saves_and_exports_as_its_slice(name, family, sliced, ids, tmp_path):
    size = family(name).sized("medium")
    size.set_budget("small")
    assert_same_weights(dict(size.state_dict()), sliced(name, "small"))
    size.save_pretrained(tmp_path / "saved")
    assert size.budget == "small"
    assert_same_weights(load(tmp_path / "saved"), sliced(name, "medium"))
    assert_same_weights(load(tmp_path / "saved", budget="small"), sliced(name, "small"))
    with pytest.raises(UnknownBudgetError):
        size.set_budget("large")
    twin = copy.deepcopy(size)
    assert twin.budget == "small"
    assert not storages(twin) & storages(size)


@each_model
@pytest.mark.parametrize("how", ["in place", ".data", "load_state_dict"])
def test_a_size_follows_the_family(name, how, family, ids, tmp_path):
    model = family(name)
    size = model.sized("small")
    before = logits(size, ids)
    if how == "load_state_dict":
        model.load_state_dict({key: tensor * 1.25 for key, tensor in model.state_dict().items()})
    else:
        for parameter in model.parameters():
            (parameter if how == "in place" else parameter.data).mul_(1.25)
        for buffer in model.state_dict(keep_vars=True).values():
            if not isinstance(buffer, torch.nn.Parameter):
                (buffer if how == "in place" else buffer.data).mul_(1.25)
    model.save_pretrained(tmp_path)
    expected = load(tmp_path, budget="small")
    after = logits(size, ids)
    assert_same_logits(after, logits(expected, ids))
    assert not torch.allclose(after, before)
    assert_same_weights(size, expected)


@each_model
@pytest.mark.parametrize("budget", ["small", None])
@pytest.mark.parametrize("change", ["cast", "assign", "data", "module"])
def test_a_size_left_behind_refuses_to_run(name, budget, change, family, ids):
    model = family(name)
    size = model.sized(budget)
    if change == "cast":
        model.to(torch.bfloat16)
    else:
        exchange(model, change)
    for run in (lambda: size(ids), lambda: size.generate(ids, **SETTINGS)):
        with pytest.raises(HFElasticError, match="since this size was taken from it.*take it again"):
            run()
    with model.at(budget):
        assert torch.equal(logits(model.sized(budget), ids), logits(model, ids))


@each_model
def test_a_size_that_was_moved_is_a_model_of_its_own(name, family, sliced, ids):
    model = family(name)
    size = model.sized("small").bfloat16()
    for parameter in model.parameters():
        parameter.mul_(2)
    assert_same_weights(size, {key: tensor.bfloat16() for key, tensor in sliced(name, "small").state_dict().items()})
    size(ids)
    assert model.dtype == torch.float32


@each_model
def test_writing_to_a_size_reaches_the_family(name, family, tmp_path):
    model = family(name)
    size = model.sized("small")
    for how in (torch.Tensor.mul_, lambda tensor, by: tensor.data.mul_(by)):
        for tensor in size.state_dict(keep_vars=True).values():
            how(tensor, 1.25)
        model.save_pretrained(tmp_path)
        assert_same_weights(load(tmp_path, budget="small"), size)


@each_model
def test_a_size_is_not_for_training(name, family, ids):
    model = family(name)
    with torch.enable_grad(), pytest.raises(HFElasticError, match="would not reach.*train the family instead"):
        model.sized("small").train()(ids).logits.sum().backward()
    with pytest.raises(HFElasticError, match=r"sized\(\) is for inference; call eval\(\) first"):
        model.train().sized("small")


@each_model
def test_base_models_have_sizes(name, family_folder, ids):
    model = AutoModel.from_pretrained(family_folder(name))
    size = model.sized("small")
    with model.at("small"):
        expected = model(ids, use_cache=False).last_hidden_state
    assert torch.equal(size(ids, use_cache=False).last_hidden_state, expected)


@each_model
@pytest.mark.parametrize("budget", SIZES)
def test_the_name_of_a_size_loads_it_again(name, budget, family, sliced):
    size = family(name).sized(budget)
    for path in (size.name_or_path, size.config._name_or_path):
        assert_same_weights(load(path), size)
    size.set_budget("small")
    assert_same_weights(load(size.config._name_or_path), sliced(name, "small"))
    size.set_budget(None)
    assert_same_weights(load(size.config._name_or_path), size)


# Threads


def in_threads(*functions):
    """Run all at once; their results in order, or the first error."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=1200) for future in [pool.submit(function) for function in functions]]


PLAN = PhasePlan(phases=[Phase("small", name="a", max_new_tokens=3), Phase("large", name="b", max_new_tokens=3)])


def jobs(model, ids):
    """Every way to run a size, by name: a function that gives a text."""
    own = {size: model.sized(size) for size in SIZES}

    def at(size):
        with model.at(size):
            return model.generate(ids, **SETTINGS)

    def by_hand(size):
        with model.at(size):
            text, cache = ids, None
            for _ in range(4):
                out = model(text if cache is None else text[:, -1:], past_key_values=cache, use_cache=True)
                text, cache = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1), out.past_key_values
            return text

    def drafting(size):
        with model.at(size):
            return model.generate(ids[:1], draft_budget="small", **SETTINGS)

    def stream():
        events = [
            e.token_id for e in model.stream_phases(ids[:1], phase_plan=PLAN, do_sample=False) if e.kind == "token"
        ]
        return torch.tensor(events)

    made = {f"sized {size}": lambda size=size: own[size].generate(ids, **SETTINGS) for size in SIZES}
    made |= {f"at {size}": lambda size=size: at(size) for size in SIZES}
    made |= {f"by hand at {size}": lambda size=size: by_hand(size) for size in SIZES}
    made |= {f"drafting for {size}": lambda size=size: drafting(size) for size in ("large", None)}
    made |= {"plan": lambda: model.generate(ids, phase_plan=PLAN, do_sample=False), "stream": stream}
    return made


@pytest.mark.parametrize(
    ("name", "rounds"),
    [("granite", 6), pytest.param("nano3", 200 if LONG else 25, marks=pytest.mark.slow)],
)
def test_eight_threads_at_random_sizes_and_plans(name, rounds, family, ids):
    """Every text is the one that it is alone, no error, and the family is at the budget that it was at."""
    model = family(name)
    model.set_budget("medium")
    made = jobs(model, ids[:, :7])
    expected = {key: job() for key, job in made.items()}
    assert len({tuple(text.flatten().tolist()) for text in expected.values()}) > 4, (
        "the sizes have to differ to show anything"
    )
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(rounds):
            key = rng.choice(list(made))
            if not torch.equal(made[key](), expected[key]):
                wrong.append(key)

    with few_switches():
        in_threads(*(lambda seed=seed: work(seed) for seed in range(8)))
    assert not wrong
    assert model.budget == "medium"


@contextmanager
def few_switches():
    """Let threads take turns as often as Python can, which finds more than its usual 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@each_model
def test_the_first_use_of_budgets_in_four_threads(name, family, sliced, ids):
    model = family(name)
    start = threading.Barrier(4)

    def first(size):
        start.wait()
        with model.at(size):
            return logits(model, ids)

    for size, out in zip(SIZES, in_threads(*(lambda size=size: first(size) for size in SIZES)), strict=True):
        assert_same_logits(out, logits(sliced(name, size), ids))
    assert model.budget == "full"


@each_model
def test_what_nobody_can_decide_is_refused(name, family, ids):
    model = family(name)
    expected = logits(model, ids)
    with another_thread(lambda: model.at("small")):
        for run in (lambda: model(ids), lambda: model.generate(ids, **SETTINGS)):
            with pytest.raises(BusyError, match=r"thread 'other' is inside at\(\).*family\.sized\('small'\)"):
                run()
        for change in (
            lambda: model.set_budget("large"),
            lambda: model.save_pretrained("nowhere"),
            lambda: model.half(),
            lambda: copy.deepcopy(model),
            lambda: model.train(),
        ):
            with pytest.raises(BusyError, match="not possible now.*family"):
                change()
        with model.at("large"):
            assert model.budget == "large"
        assert torch.equal(logits(model.sized(None), ids), expected)
        with model.at(None):
            assert torch.equal(logits(model, ids), expected)
    assert model.budget == "full"
    assert torch.equal(logits(model, ids), expected)


@each_model
def test_nobody_switches_a_family_that_runs(name, family, ids):
    model = family(name)
    expected = model.generate(ids, **SETTINGS)
    refused = []

    class Meanwhile:
        """Sets another budget from another thread while tokens are chosen."""

        def __call__(self, input_ids, scores):
            def other():
                with pytest.raises(BusyError, match="another thread is running this family"):
                    model.set_budget("small")
                with model.at("small"):
                    refused.append(model.budget)

            in_threads(other)
            return scores

    assert torch.equal(model.generate(ids, logits_processor=[Meanwhile()], **SETTINGS), expected)
    assert refused == ["small"] * SETTINGS["max_new_tokens"]
    assert model.budget == "full"


@each_model
def test_a_budget_that_another_thread_set_is_said(name, family, ids):
    model = family(name)
    model.set_budget("small")
    expected = logits(model, ids)
    in_threads(lambda: model.set_budget("large"))
    with pytest.raises(BusyError, match=r"another thread has called set_budget\(\).*Call it again"):
        model(ids)
    in_threads(lambda: model(ids))  # who has set none follows
    model.set_budget("small")
    assert torch.equal(logits(model, ids), expected)
    in_threads(lambda: model.set_budget("small"))
    assert torch.equal(logits(model, ids), expected)


@each_model
def test_tasks_at_different_budgets(name, family, sliced, ids):
    """One thread, several tasks that take turns; and threads that a task starts by `to_thread` are at its budget."""
    model = family(name)

    async def run(size):
        with model.at(size):
            outs = []
            for _ in range(3):
                await asyncio.sleep(0)
                outs.append(logits(model, ids))
                outs.append(await asyncio.to_thread(logits, model, ids))
            return outs

    async def together():
        return await asyncio.gather(*(run(size) for size in SIZES))

    for size, outs in zip(SIZES, asyncio.run(together()), strict=True):
        for out in outs:
            assert_same_logits(out, logits(sliced(name, size), ids))
    assert model.budget == "full"


@each_model
def test_blocks_that_end_in_another_order(name, family, ids):
    """Generators that hold a block may be closed whenever, and in another thread."""
    model = family(name)

    def holding(size):
        with model.at(size):
            yield model.budget

    one, other = holding("large"), holding("small")
    assert [next(one), next(other)] == ["large", "small"]
    one.close()
    assert model.budget == "small"
    in_threads(other.close)
    assert model.budget == "full"
    model(ids)


def test_reading_and_drafting_do_not_disturb_each_other(family, ids):
    """Drafting changes settings of mixers while it reads; others that read a prompt meanwhile must not see them."""
    model = family("nano3")
    mixers = [m for m in model.modules() if hasattr(m, "time_step_limit")]
    before = [(m.time_step_limit, m.chunk_size) for m in mixers]
    seen = []

    class Look:
        def __call__(self, input_ids, scores):
            seen.append([(m.time_step_limit, m.chunk_size) for m in mixers] == before)
            return scores

    model.generate(ids[:1], draft_budget="small", logits_processor=[Look()], **SETTINGS)
    assert seen
    assert all(seen)


# Caches


@each_model
@pytest.mark.parametrize("first", SIZES)
def test_a_cache_of_another_budget_is_refused(name, first, family, sliced, ids):
    model = family(name)
    with model.at(first):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        expected = sliced(name, first)(ids).logits[:, 9:]
    for other in SIZES:
        if other != first:
            with model.at(other), pytest.raises(HandoverError, match="this cache was written by .*phase_plan"):
                model(ids[:, 9:], past_key_values=copy.deepcopy(cache), use_cache=True)
            with model.at(other), pytest.raises(HandoverError, match="this cache was written by"):
                model.generate(ids, past_key_values=copy.deepcopy(cache), **SETTINGS)
    with model.at(first):
        assert_same_logits(model(ids[:, 9:], past_key_values=cache, use_cache=True).logits, expected, atol=2e-4)


@each_model
def test_a_cache_of_other_shapes_is_refused(name, family, sliced, ids):
    """Written by a model that notes nothing on it."""
    model = family(name)
    stock = model.architecture.causal_class(sliced(name, "large").config)
    cache = stock(ids, use_cache=True).past_key_values
    with pytest.raises(HandoverError, match="written by another model or budget"):
        model(ids, past_key_values=cache)
    with model.at("large"):
        model(ids, past_key_values=cache)


@each_model
def test_a_cache_of_a_size_goes_on_in_the_family(name, family, ids):
    model = family(name)
    size = model.sized("small")
    cache = size(ids[:, :9], use_cache=True).past_key_values
    with model.at("small"):
        model(ids[:, 9:], past_key_values=copy.deepcopy(cache), use_cache=True)
    with pytest.raises(HandoverError, match="this cache was written by"):
        model(ids[:, 9:], past_key_values=cache, use_cache=True)
    empty = DynamicCache(config=model.config)
    model(ids, past_key_values=empty)
