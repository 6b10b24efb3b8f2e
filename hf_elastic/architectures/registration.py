"""Tables of other people: `register_architecture`, and what is checked before one is taken."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ..errors import ElasticConfigError, shown
from .base import Architecture, Axis
from .registry import ARCHITECTURES
from .submodel import LAYERS


def register_architecture(table: type[Architecture], *, exist_ok: bool = False) -> type[Architecture]:
    """Add the table of a `model_type`; from then on everything of this library takes its models.

    Registered tables are known to this process only. A package that brings one names it as an entry point of the group `hf_elastic.architectures`
    instead, and is found wherever it is installed:

    ```toml
    [project.entry-points."hf_elastic.architectures"]
    my_model = "my_package.my_table:MyModel"
    ```

    Args:
        table (`type[Architecture]`): The class, with everything declared. It may be used as a decorator.
        exist_ok (`bool`, *optional*, defaults to `False`): Replace the table that this `model_type` has.

    Returns:
        `type[Architecture]`: The same class.

    Raises:
        `ElasticConfigError`: it is no such class, declares too little or what does not go together, or there is a table already.

    Example:

    ```python
    >>> import hf_elastic
    >>> from hf_elastic.testing import check_architecture

    >>> hf_elastic.register_architecture(MyModel)
    >>> print(check_architecture(MyConfig(hidden_size=48, ...)))
    ```
    """
    if not (isinstance(table, type) and issubclass(table, Architecture)):
        raise ElasticConfigError(
            f"register_architecture takes a subclass of hf_elastic.architectures.Architecture, which {shown(table)} is not."
        )
    if problems := list(_problems(table)):
        raise ElasticConfigError(f"{table.__name__} is no complete table: {'; '.join(problems)}.")
    if table.model_type in ARCHITECTURES and not exist_ok:
        raise ElasticConfigError(
            f"there is a table of model_type {table.model_type!r} already; give exist_ok=True to replace it."
        )
    ARCHITECTURES.register(table)
    return table


def _problems(table: type[Architecture]) -> Iterator[str]:
    """What is missing, or does not go together."""
    if inspect.isabstract(table):
        yield f"it does not define {', '.join(sorted(table.__abstractmethods__))}"
    model_type = getattr(table, "model_type", None)
    if not (isinstance(model_type, str) and model_type):
        yield f"model_type={shown(model_type)} is no name of a stock model"
    for name in ("causal_class", "base_class"):
        yield from _class_problems(name, getattr(table, name, None), model_type)
    if not hasattr(table, "layer_class") and table.build_layer is Architecture.build_layer:
        yield "it has neither layer_class nor build_layer"
    axes = getattr(table, "axes", None)
    if not (isinstance(axes, tuple) and axes and all(isinstance(axis, Axis) for axis in axes)):
        yield f"axes={shown(axes)} must be a tuple of Axis, at least one"
        return
    names = [axis.name for axis in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"the axes {twice} are there twice"
    if LAYERS in names:
        yield f"no axis may be called {LAYERS!r}: that is what depth is called"
    if "hidden" not in names:
        yield "it has no axis 'hidden', the residual stream, which every norm is corrected by"


def _class_problems(name: str, found: Any, model_type: Any) -> Iterator[str]:
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        yield f"{name}={shown(found)} is no class of transformers models"
    elif (theirs := getattr(getattr(found, "config_class", None), "model_type", None)) != model_type:
        yield f"{name} {found.__name__} is of model_type {theirs!r}, not {shown(model_type)}"
