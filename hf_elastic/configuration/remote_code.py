"""`trust_remote_code=True` for programs that never import this package: a small module beside the weights that imports it for them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "modeling_elastic"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.ElasticConfig",
    "AutoModel": f"{MODULE}.ElasticModel",
    "AutoModelForCausalLM": f"{MODULE}.ElasticForCausalLM",
}
"""What `config.json` says under `auto_map`."""

_SOURCE = '''\
"""Lets programs that never import hf_elastic load this checkpoint, with trust_remote_code=True. Nothing else is in here."""

try:
    from hf_elastic import ElasticConfig, ElasticForCausalLM, ElasticModel
except ImportError as error:
    raise ImportError("this elastic checkpoint is loaded by the package hf_elastic: pip install hf-elastic") from error

__all__ = ["ElasticConfig", "ElasticForCausalLM", "ElasticModel"]
'''


def write_module(directory: Path) -> None:
    """Write the module that `AUTO_MAP` names."""
    (directory / f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")


def add_to_transformers(*classes: type) -> None:
    """Let `transformers serve` find classes: it asks no AutoClass, but looks for what `architectures` says among the names of transformers.

    Transformers puts another module in its own place while it is imported. Who imported it before that holds the first one, so both get them.
    """
    held = [
        vars(module).get("transformers") for module in list(sys.modules.values()) if isinstance(module, ModuleType)
    ]
    for module in (sys.modules["transformers"], *held):
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            vars(module).update({made.__name__: made for made in classes})


class InstalledCode:
    """For classes that a checkpoint's module only passes on: they are not saved beside the weights as if they were defined there."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """The AutoClasses call this for every class that comes from a checkpoint; these come from the installed package."""
