"""What runs along every tensor of a model, and what follows from it: one table per stock `model_type`, with the registry of them."""

from __future__ import annotations

from .base import Architecture, Axis, StateRule, uniform
from .registry import ARCHITECTURES, as_stock, get_architecture

__all__ = ["ARCHITECTURES", "Architecture", "Axis", "StateRule", "as_stock", "get_architecture", "uniform"]
