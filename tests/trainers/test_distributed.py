"""Two ranks compute what one process computes, also when budgets drop layers and differ between the micro-batches of a step."""

from __future__ import annotations

import socket

import fresh
import pytest
import torch
import two_ranks

pytestmark = pytest.mark.slow

# float32; the same sums in another order, through three steps of at most 0.01
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks; one launch for all runs, and one import for both processes, because starting takes longer than running."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    processes = [fresh.process(two_ranks.on_rank, folder, environment) for environment in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
        process.kill()  # the other one waits for a rank that failed
    assert [process.exitcode for process in processes] == [0, 0], "pytest -s shows what they said"
    return [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(2)]


def assert_same_weights(ours, theirs, **close):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if close:
            torch.testing.assert_close(tensor, theirs[key], **close, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", two_ranks.TRAINED)
def test_ddp_through_the_trainer_is_one_process(name, ranks, tmp_path):
    first, second = (results[f"trainer {name}"] for results in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    assert first["rows"][0][0] == 2
    one = two_ranks.train(name, tmp_path, ranks=1)
    assert one["rows"][0][0] == 4
    assert first["budgets"] == second["budgets"] == one["budgets"]
    if name == "only_small":
        assert {budget for step in one["budgets"] for budget in step} == {"small"}
    elif name == "handover":
        assert any(">" in budget for step in one["budgets"] for budget in step)
    elif name == "quantized":
        assert set(one["budgets"][0]) == {"full", "small"}
    else:  # the trap: what an earlier micro-batch used and the last one, which reduces, does not
        assert any(step[-1] == "small" and step[0] in ("full", "large") for step in one["budgets"])
    assert_same_weights(first["state"], second["state"])
    assert_same_weights(first["state"], one["state"], **CLOSE)
    assert len(first["logs"]) == len(one["logs"]) == two_ranks.TRAINED[name].get("max_steps", 3)
    for ours, theirs in zip(first["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert first["eval"] == pytest.approx(one["eval"], rel=1e-3)


def test_a_router_on_two_ranks_is_one_process(ranks, tmp_path):
    first, second = (results["router"] for results in ranks)
    one = two_ranks.route(tmp_path, ranks=1)
    assert first["sizes"] == second["sizes"] == one["sizes"]
    assert first["report"] == second["report"]
    for part in ("router", "state"):
        assert_same_weights(first[part], second[part])
        assert_same_weights(first[part], one[part], **CLOSE)


@pytest.mark.parametrize("name", two_ranks.SHARDED)
def test_fully_sharded_stencils_are_one_process(name, ranks):
    first, second = (results[f"fully_shard {name}"] for results in ranks)
    assert first["kinds"] == {"DTensor"}
    one = two_ranks.shard(name, 0, 1)
    assert_same_weights(first["state"], second["state"])
    assert_same_weights(first["state"], one["state"], **CLOSE)
    losses = [(a + b) for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert losses == pytest.approx(one["losses"], rel=1e-4)
    start = dict(two_ranks.student(name).named_parameters())
    moved = max(float((p - start[key]).abs().max()) for key, p in first["state"].items())
    assert moved > (5e-3 if name == "quantized" else 1e-2)
    assert len(first["rounded"]) == len(second["rounded"]) == len(one["rounded"])
    assert bool(one["rounded"]) == (name == "quantized")
    for ours, theirs, whole in zip(first["rounded"], second["rounded"], one["rounded"], strict=True):
        assert torch.equal(ours, whole)  # bit for bit: scales of a shard would be others
        assert torch.equal(theirs, whole)
