"""What `import hf_elastic` gives at once, what it gives when asked, and what it says of the rest."""

import inspect
import subprocess
import sys

import pytest

import hf_elastic
import hf_elastic.trainers
from hf_elastic import errors


def test_every_error_and_warning_is_there():
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, (Exception, Warning)) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 10
    assert [name for name in classes if getattr(hf_elastic, name, None) is not getattr(errors, name)] == []
    assert set(classes) <= set(hf_elastic.__all__)


def test_names_of_trainers_are_there():
    for name in hf_elastic.trainers.__all__:
        assert getattr(hf_elastic, name) is getattr(hf_elastic.trainers, name)
        assert name in dir(hf_elastic)


@pytest.mark.parametrize("name", sorted(hf_elastic._ELSEWHERE))
def test_names_of_other_modules_are_there(name):
    value = getattr(hf_elastic, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert name not in hf_elastic.__all__, "`from hf_elastic import *` stays light, too"


LIGHT = """
import sys
import hf_elastic
heavy = ("trl", "peft", "gradio", "lm_eval", "matplotlib", "hf_elastic.trainers", "hf_elastic.lab", "hf_elastic.commands")
assert not (there := [name for name in heavy if name in sys.modules]), there
sys.modules["trl"] = None  # as if it were not installed
for name in ("ElasticDistillationTrainer", "Curriculum"):
    try:
        exec(f"from hf_elastic import {name}")
    except ImportError as error:
        assert str(error) == f"{name} is in hf_elastic.trainers, which needs trl: pip install 'hf-elastic[train]'", error
    else:
        raise AssertionError(name)
for statement in ("import hf_elastic.trainers", "from hf_elastic import trainers", "hf_elastic.trainers"):
    try:
        exec(statement)
    except ImportError as error:
        assert str(error) == "hf_elastic.trainers needs trl: pip install 'hf-elastic[train]'", error
    else:
        raise AssertionError(statement)
assert hf_elastic.lab.__name__ == "hf_elastic.lab" and hf_elastic.evaluation and hf_elastic.plan_matrix
import inspect, pydoc
assert "Stage" not in dict(inspect.getmembers(hf_elastic)) and "elastify" in pydoc.render_doc(hf_elastic, renderer=pydoc.plaintext)
from hf_elastic.cli import main
assert main(["train", sys.executable]) == 2  # any file
"""


def test_it_is_light_and_says_what_is_missing():
    """In a process of its own, as this one has loaded everything."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "hf-elastic train: training needs trl: pip install 'hf-elastic[train]'\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ElasticDistilationTrainer", " Did you mean 'ElasticDistillationTrainer'?"),
        ("elastifi", " Did you mean 'elastify'?"),
        ("Tokenizererror", " Did you mean 'TokenizerError'?"),
        ("quux", ""),
    ],
)
def test_other_names_are_none(name, hint):
    with pytest.raises(AttributeError) as caught:
        getattr(hf_elastic, name)
    assert str(caught.value) == f"module 'hf_elastic' has no attribute {name!r}.{hint}"
    assert not hasattr(hf_elastic, name)


def test_all_that_is_listed_is_there():
    assert [name for name in hf_elastic.__all__ if not hasattr(hf_elastic, name)] == []
