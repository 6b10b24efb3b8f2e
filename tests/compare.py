"""How the tests compare models: weights bit by bit, logits within a tolerance that has a reason."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

ATOL = 2e-5
"""For float32 logits of magnitude 1 to 10 that are the same sums over other memory: `x * 0` terms left out, another alignment, and so
another order of summation. The largest difference seen is 5e-6; a wrong row, scale or epsilon gives more than 1e-2."""


def assert_same_weights(left: PreTrainedModel | dict, right: PreTrainedModel | dict) -> None:
    """The same names, shapes, dtypes and bits."""
    left, right = (m if isinstance(m, dict) else m.state_dict() for m in (left, right))
    assert left.keys() == right.keys()
    different = [
        name for name in left if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]
    assert not different


def assert_same_logits(left: torch.Tensor, right: torch.Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=0)


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits
