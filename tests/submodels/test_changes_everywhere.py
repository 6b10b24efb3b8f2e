"""What is changed in one form of a family is what every other form runs on, without a switch in between; and who is meant is who runs."""

from __future__ import annotations

import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import assert_same_logits, assert_same_weights, logits
from others import another_thread
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from hf_elastic import BusyError, CheckpointError, HandoverError, HFElasticError, Phase, PhasePlan

load = AutoModelForCausalLM.from_pretrained
each_model = pytest.mark.parametrize("name", ["nano3", "granite"])
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def fresh(model, budget):
    """What a budget of the family's weights as they are computes, worked out by a copy that never ran another one."""
    twin = copy.deepcopy(model)
    twin.set_budget(budget)
    return twin


def doubled(model):
    with model.at(None):
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.mul_(1.5)


# Changes


@each_model
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_optimizers_change_weights_without_counting_it(name, optimizer, family, ids, tmp_path):
    """A size that was taken before, and looked at, neither runs on old weights nor brings them back."""
    model, other = family(name), family(name)
    size = model.sized("small")
    size.to("cpu")  # looks at every tensor
    for one in (model, other):
        one.train()
        made = optimizer(one.parameters(), lr=0.05, fused=True)
        with torch.enable_grad():
            one(ids, labels=ids, use_cache=False).loss.backward()
        made.step()
        one.eval()
    assert_same_logits(logits(size, ids), logits(fresh(other, "small"), ids))
    with model.at("small"):
        assert_same_logits(logits(model, ids), logits(fresh(other, "small"), ids))
    model.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), other)


@each_model
def test_what_is_written_to_a_size_is_what_the_family_and_other_sizes_run_on(name, family, ids):
    model = family(name)
    small, large = model.sized("small"), model.sized("large")
    before = logits(model, ids)
    small.load_state_dict({key: tensor * 1.5 for key, tensor in small.state_dict().items()})
    expected = {budget: logits(fresh(model, budget), ids) for budget in ("large", None)}
    assert not torch.allclose(expected[None], before)
    assert_same_logits(logits(model, ids), expected[None])
    assert_same_logits(logits(large, ids), expected["large"])


@each_model
def test_looking_at_the_family_does_not_undo_an_edit_at_a_budget(name, family, ids):
    model = family(name)
    model.set_budget("small")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.mul_(1.5)
    edited = logits(model, ids)
    _ = [parameter.data for parameter in model.parameters()]
    assert torch.equal(logits(model, ids), edited)


@each_model
def test_new_memory_under_the_family_is_noticed_at_a_live_budget(name, family, ids):
    model = family(name)
    model.set_budget("small")
    vector = torch.nn.utils.parameters_to_vector(model.parameters()) * 1.5
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    assert_same_logits(logits(model, ids), logits(fresh(model, "small"), ids))


@each_model
def test_what_reads_without_a_call_reads_what_is_there_now(name, family, ids, tmp_path):
    model = family(name)
    size = model.sized("small")
    model.set_budget("small")
    model.set_budget(None)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.mul_(1.5)
    expected = fresh(model, "small").state_dict()
    assert_same_weights(dict(size.state_dict()), expected)
    assert_same_weights(copy.deepcopy(size), expected)
    size.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), expected)


@each_model
def test_a_size_of_a_size_follows_the_family(name, family, ids):
    model = family(name)
    size = model.sized("medium").sized("small")
    doubled(model)
    assert_same_logits(logits(size, ids), logits(fresh(model, "small"), ids))
    model.load_state_dict({key: tensor * 2 for key, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(HFElasticError, match="take it again"):
        size(ids)


@each_model
def test_a_stream_goes_on_with_the_weights_that_are_there(name, family, ids):
    """Every token is that of the weights when it is chosen."""
    model = family(name)
    plan = PhasePlan(phases=[Phase("small", max_new_tokens=4)])
    events = [
        e
        for e in model.stream_phases(ids[:1, :6], phase_plan=plan, do_sample=False, output_logits=True)
        if e.kind == "token"
    ]
    assert len(events) == 4
    stream = model.stream_phases(
        ids[:1, :6], phase_plan=plan, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    while next(stream).kind != "token":
        pass
    model.lm_head.weight.mul_(-1.0)  # what was most likely is least likely now
    try:
        while True:
            next(stream)
    except StopIteration as stop:
        output = stop.value
    twin = family(name)
    first = [
        e
        for e in twin.stream_phases(
            ids[:1, :6], phase_plan=PhasePlan(phases=[Phase("small", max_new_tokens=1)]), do_sample=False
        )
        if e.kind == "token"
    ]
    assert output.sequences[0, 6] == first[0].token_id
    model.set_budget("small")
    rest = torch.cat([ids[:1, :6], output.sequences[:, 6:7]], dim=1)
    assert int(model(rest).logits[0, -1].argmax()) == int(output.sequences[0, 7])


# Whole state dicts at a smaller budget


@each_model
@pytest.mark.parametrize("strict", [True, False])
def test_the_familys_state_dict_at_a_budget_goes_to_the_family(name, strict, checkpoint, ids):
    """Also where layers were dropped, whose names and shapes fit into those of the budget."""
    model = load(checkpoint(name))
    wanted = {key: tensor * 1.5 for key, tensor in model.state_dict().items()}
    layers = [0, 2, 3]
    model.set_budget({"layers": layers})
    model.load_state_dict(wanted, strict=strict)
    assert model.submodel.layers == tuple(layers)
    model.set_budget(None)
    assert_same_weights(dict(model.state_dict()), wanted)


@each_model
def test_a_state_dict_of_something_else_is_refused_whatever_strict_says(name, family):
    model = family(name)
    other = {key: tensor.clone() for key, tensor in model.sized("medium").state_dict().items()}
    model.set_budget("small")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="neither that of the active budget nor that of the family"):
        model.load_state_dict(other, strict=False)
    assert model.budget == "small"
    assert_same_weights(dict(model.state_dict()), before)


# Who runs


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=120)


def beside(model, size, run):
    """Run something inside `at(size)` while another thread is inside `at("small")`."""
    with another_thread(lambda: model.at("small")), model.at(size):
        return run()


@pytest.mark.slow
@each_model
def test_a_compiled_family_and_its_sizes_run_what_is_meant(name, family, ids):
    """What `compile` keeps on a model leads back to that very model; who is meant is asked at every call."""
    torch._dynamo.reset()
    model = family(name)
    expected = {size: logits(fresh(model, size), ids) for size in ("small", "large", None)}
    model.compile(backend="eager")
    assert_same_logits(logits(model, ids), expected[None])
    assert_same_logits(logits(model.sized("small"), ids), expected["small"])
    compiled = torch.compile(family(name), backend="eager")
    family_of = compiled._orig_mod
    assert_same_logits(compiled(ids, use_cache=False).logits, expected[None])
    out = beside(family_of, "large", lambda: compiled(ids, use_cache=False).logits)
    assert_same_logits(out, expected["large"])


@each_model
def test_a_block_inside_a_running_call_runs_its_own_budget(name, family, ids):
    model = family(name)
    expected = logits(fresh(model, "small"), ids)
    seen = []

    class Look:
        def __call__(self, input_ids, scores):
            def other():
                with model.at("large"):
                    pass

            in_thread(other)
            with model.at("small"):
                seen.append(model(ids, use_cache=False).logits)
            return scores

    model.generate(ids[:, :5], logits_processor=[Look()], **SETTINGS)
    for out in seen:
        assert_same_logits(out, expected)


@each_model
def test_beside_another_thread_the_familys_own_tensors_are_refused(name, family):
    model = family(name)
    for read in (
        lambda: model.state_dict(),
        lambda: model.load_state_dict({}),
        lambda: model.get_input_embeddings(),
        lambda: model.get_output_embeddings(),
    ):
        with pytest.raises(BusyError, match="another thread runs at another budget now"):
            beside(model, "large", read)


@each_model
def test_a_call_that_outlives_its_block_ends_at_its_budget_and_the_family_goes_back(name, family, ids):
    model = family(name)
    expected = {size: model.sized(size).generate(ids[:, :5], **SETTINGS) for size in ("small", None)}
    started, go_on = threading.Event(), threading.Event()

    class Wait:
        def __call__(self, input_ids, scores):
            started.set()
            assert go_on.wait(60)
            return scores

    pool = ThreadPoolExecutor(1)
    with model.at("small"):
        inside = contextvars.copy_context()
        text = pool.submit(inside.run, model.generate, ids[:, :5], logits_processor=[Wait()], **SETTINGS)
        assert started.wait(60)
    assert model.budget == "full"  # left without waiting
    assert torch.equal(model.generate(ids[:, :5], **SETTINGS), expected[None])
    go_on.set()
    assert torch.equal(text.result(timeout=60), expected["small"])
    pool.shutdown()
    assert model._active == model._full
    assert torch.equal(model.generate(ids[:, :5], **SETTINGS), expected[None])


@each_model
def test_a_budget_cannot_be_set_to_what_another_thread_is_inside_of(name, family):
    model = family(name)
    with another_thread(lambda: model.at("small")), pytest.raises(BusyError):
        model.set_budget("small")
    assert model.budget == "full"


@each_model
def test_a_streamer_ends_when_its_thread_is_refused(name, family, ids):
    """Who reads it would wait for ever."""

    class Letters:
        def decode(self, tokens, **kwargs):
            return "x" * len(tokens)

    model = family(name)
    streamer, errors = TextIteratorStreamer(Letters(), timeout=60), []

    def run():
        try:
            model.generate(ids[:1, :5], streamer=streamer, **SETTINGS)
        except BusyError as error:
            errors.append(error)

    with model.at("small"):
        thread = threading.Thread(target=run)
        thread.start()
        assert "".join(streamer) == ""
        thread.join()
    assert len(errors) == 1


@each_model
def test_caches_in_tuples_know_their_budget_too(name, family, ids):
    model = family(name)
    with model.at("large"):
        outputs = model(ids[:, :9], use_cache=True, return_dict=False)
    cache = next(part for part in outputs if hasattr(part, "layers"))
    with pytest.raises(HandoverError, match="this cache was written by"):
        model(ids[:, 9:], past_key_values=cache)


@each_model
def test_threads_that_save_one_family_wait_for_each_other(name, family, tmp_path):
    model = family(name)
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_budget("small")
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(model.save_pretrained, tmp_path / str(i)) for i in range(4)]
        assert all(future.result(timeout=120) is None for future in done)
    for i in range(4):
        assert_same_weights(load(tmp_path / str(i)), whole)
    assert model.budget == "small"
