"""Training on a GPU is what it is on the CPU. CI has none, so these run where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from runs import family, trainer

KERNELS = importlib.util.find_spec("mamba_ssm")
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or bool(KERNELS), reason="needs a GPU, and no kernels that refuse the CPU"
    ),
    pytest.mark.usefixtures("exact_products"),
]


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_steps(name, tmp_path):
    """Three steps of plain descent, budgets drawn alike, end at the same weights but for rounding."""
    start, ends = family(name).state_dict(), []
    for cpu in (True, False):
        with torch.enable_grad():
            run = trainer(tmp_path / str(cpu), family(name), use_cpu=cpu, max_steps=3, learning_rate=0.1, optim="sgd")
            run.train()
        assert run.model.device.type == ("cpu" if cpu else "cuda")
        ends.append({key: tensor.cpu() for key, tensor in run.model.state_dict().items()})
    steps = {key: (ends[0][key] - start[key]).abs().max().item() for key in start}
    assert sum(step > 1e-4 for step in steps.values()) > len(steps) // 2
    for key, step in steps.items():
        torch.testing.assert_close(ends[1][key], ends[0][key], atol=max(1e-6, 0.05 * step), rtol=0, msg=key)
