"""Parents, their elastic checkpoints on disk, and how the tests compare models."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
import transformers.utils.hub
from cases import BUDGETS, VOCAB, build_parent
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.storage import checksums, fetching, retries

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from local_hub import LocalHub

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so it is in processes that tests start

gc.set_threshold(50_000, 20, 20)  # the default walks over everything that is imported again and again

Parents = Callable[[str], PreTrainedModel]
Checkpoints = Callable[[str], Path]


def pytest_collection_finish() -> None:
    """Leave the libraries out of garbage collection: every run of a trainer collects, which took a fifth of its tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def originals() -> dict[str, PreTrainedModel]:
    return {}


@pytest.fixture(scope="session")
def original(originals) -> Parents:
    """Stock parents by name, built once. Tests that change one take `parent`."""

    def get(name: str) -> PreTrainedModel:
        if name not in originals:
            originals[name] = build_parent(name)
        return originals[name]

    return get


@pytest.fixture
def parent(original) -> Parents:
    """A copy of a stock parent of one's own."""
    return lambda name: copy.deepcopy(original(name))


@pytest.fixture(scope="session")
def checkpoint(original, tmp_path_factory) -> Checkpoints:
    """Folder of a parent's elastic checkpoint without named budgets, written by the stock class; not to be changed."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            original(name).save_pretrained(folder)
            ElasticConfig.from_parent(original(name).config, {}).save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return get


@pytest.fixture(scope="session")
def family_folder(original, tmp_path_factory) -> Checkpoints:
    """Folder of an elastic checkpoint with the `BUDGETS` of that parent; not to be changed."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(f"{name}-family")
            original(name).save_pretrained(folder)
            ElasticConfig.from_parent(original(name).config, BUDGETS[name]).save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return get


@pytest.fixture
def own_folder(family_folder, tmp_path) -> Checkpoints:
    """A copy of a family's folder, for tests that damage it."""
    return lambda name: Path(shutil.copytree(family_folder(name), tmp_path / name))


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Two sequences longer than two Mamba chunks, so that states are handed over between chunks."""
    return torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def exact_products() -> Iterator[None]:
    """On a GPU convolutions may use tf32 unless told otherwise."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def listing() -> Callable[[Path], dict[str, bytes]]:
    """Everything below a folder, to show that nothing was written."""
    return lambda folder: {
        str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> Iterator[LocalHub]:
    """An empty Hub on this machine. `HF_ENDPOINT` is read when the client is imported, so its constants are set as it would have set them."""
    with LocalHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "default"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield hub


@pytest.fixture(scope="session")
def hub_folders(original, tmp_path_factory) -> Path:
    """One family four times: nested, in one stock file, in a stock file per layer or so, and the same with checksums of small blocks."""
    folder: Path = tmp_path_factory.mktemp("hub")
    original("nano3").save_pretrained(folder / "stock")
    ElasticConfig.from_parent(original("nano3").config, BUDGETS["nano3"]).save_pretrained(folder / "stock")
    family = ElasticForCausalLM.from_pretrained(folder / "stock")
    family.save_pretrained(folder / "nested", layout="nested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", 256)
        family.save_pretrained(folder / "checked", max_shard_size="60KB")
    shutil.copytree(folder / "checked", folder / "sharded")
    (folder / "sharded" / checksums.CHECKSUMS_NAME).unlink()
    return folder


@pytest.fixture
def hub(hub_folders, local_hub, monkeypatch) -> LocalHub:
    """The server, with all of them."""
    for name in ("nested", "stock", "sharded", "checked"):
        local_hub.commit(f"org/{name}", hub_folders / name)
    monkeypatch.setattr(retries, "WAIT", 0)
    monkeypatch.setattr(fetching, "_GAP", 0)  # in tiny files everything is near
    return local_hub


@pytest.fixture
def pull(hub, tmp_path) -> Callable[..., PreTrainedModel]:
    """Load from the server, with a cache of one's own."""

    def pull(repo: str, budget: str | None = None, **kwargs: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(repo, budget=budget, cache_dir=tmp_path / "cache", **kwargs)

    return pull


@pytest.fixture(scope="session")
def pulled(hub_folders) -> Callable[[str | None], PreTrainedModel]:
    """What `pull` has to give."""
    models: dict[str | None, PreTrainedModel] = {}

    def get(budget: str | None) -> PreTrainedModel:
        if budget not in models:
            models[budget] = ElasticForCausalLM.from_pretrained(hub_folders / "stock", budget=budget)
        return models[budget]

    return get
