"""`hf-elastic quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized import quantizable_family

from hf_elastic import ElasticConfig
from hf_elastic.cli import main


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "family"
    quantizable_family("nemotron", folder)
    return folder


def test_what_is_asked_for_is_written_and_shown(family, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--format", "nvfp4", "--keep", "shared_experts", "--keep", "*.layers.1.*"]
    assert main(["quantize", str(family), str(out), *options, "--layout", "nested", "--budget", "mid"]) == 0
    printed = capsys.readouterr()
    assert f"saved to {out}" in printed.out
    assert "nvfp4" in printed.out
    assert "quantize: 100%" in printed.err
    elastic = ElasticConfig.from_pretrained(out)
    layers = {name.split(".")[2] for name in elastic.encodings}
    assert layers == {"3", "5", "7"}
    assert not any("shared_experts" in name for name in elastic.encodings)
    assert set(elastic.elastic["files"]) == {"small", "mid"}
    assert elastic.elastic["quantization"]["recipe"]["shared_experts"] is None


def test_a_recipe_is_a_file(family, tmp_path):
    (tmp_path / "recipe.yaml").write_text("attention: nvfp4\nmamba: fp8\n")
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert main(["quantize", str(family), str(tmp_path / "out"), *recipe]) == 0
    formats = {encoding.name for encoding in ElasticConfig.from_pretrained(tmp_path / "out").encodings.values()}
    assert formats == {"nvfp4", "fp8"}


WRONG = [
    ([], "give either --format nvfp4, --format fp8 or --recipe FILE"),
    (["--format", "fp8", "--recipe", "x.yaml"], "give either --format"),
    (["--format", "int4"], "--format=int4 must be nvfp4 or fp8; files are given as --recipe"),
    (["--recipe", "fp8"], "--recipe=fp8 is no file; formats are given as --format"),
    (["--format", "fp8", "--keep", "attn"], "Did you mean 'attention'"),
    (["--format", "fp8", "--budget", "smal"], "Did you mean 'small'"),
    (["--format", "fp8", "--elastic-config", "auto"], "says itself what it nests"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(options, said, family, tmp_path, capsys):
    assert main(["quantize", str(family), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["quantize", str(family), str(family), "--format", "fp8"]) == 2
    assert "is the checkpoint that is read" in capsys.readouterr().err
