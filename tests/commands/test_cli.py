"""The command line, in this process; one test starts it as users do."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from peft import PeftModel
from pyarrow import ArrowInvalid
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from yaml import YAMLError

from hf_elastic import ElasticConfig, ElasticForCausalLM, Scores
from hf_elastic.cli import COMMANDS, main
from hf_elastic.commands.common import parse_sizes, table
from hf_elastic.commands.elastify import parse_budget
from hf_elastic.errors import ElasticConfigError
from hf_elastic.lab.parent import PARENT_DIR
from hf_elastic.lab.task import problems


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """The lab's parent made elastic from a shell: texts, shares, a target, depth, kept scores."""
    folder = tmp_path_factory.mktemp("cli")
    stream = problems("train", 6, 0)
    lines = [json.dumps({"text": next(stream).text}) for _ in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    arguments = ["elastify", PARENT_DIR, folder / "elastic", "--calibration", folder / "text.jsonl"]
    arguments += ["--axis", "expert_ffn", "--axis", "shared_expert_ffn=1.0,0.75,0.5", "--axis", "hidden=48,40"]
    arguments += ["--budget", "wide:expert_ffn=0.75,shared_expert_ffn=48", "--budget", "small=80k"]
    arguments += ["--save-scores", folder / "scores", "--batch-size", "4"]
    assert main([str(a) for a in arguments]) == 0
    return folder


def run_json(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_elastify_saves_budgets_tokenizer_and_scores(elastic, capsys):
    plan = run_json(capsys, "plan", elastic / "elastic", "--json")
    names = [entry["name"] for entry in plan["budgets"]]
    assert names == ["full", "wide", "small"]
    assert plan["budgets"][1]["sizes"]["expert_ffn"] == 24
    assert plan["budgets"][2]["total_params"] <= 80_000
    tokenizer = AutoTokenizer.from_pretrained(elastic / "elastic")
    assert tokenizer.decode(tokenizer("^1a+2>")["input_ids"]) == "^1a+2>"
    assert set(Scores.load(elastic / "scores").values) == {"hidden", "expert_ffn", "shared_expert_ffn"}


def test_scores_are_reused_and_a_spec_file_is_read(elastic, tmp_path, capsys):
    spec = {"budgets": {"per-layer": {"expert_ffn": {"1": 24, "5": 16}}}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    arguments = ["elastify", str(PARENT_DIR), str(tmp_path / "out"), "--spec", str(tmp_path / "spec.json")]
    assert main([*arguments, "--scores", str(elastic / "scores")]) == 0
    sizes = run_json(capsys, "plan", tmp_path / "out", "--json")["budgets"][1]["sizes"]
    assert sizes["expert_ffn"] == [None, 24, None, 32, None, 16]


@pytest.mark.parametrize("share", ["50%", "0.5"])
def test_elastify_takes_shares_and_says_what_it_found(share, tmp_path, capsys):
    axes = ["--axis", "expert_ffn=32,16,8", "--axis", "hidden=48,24"]
    arguments = ["elastify", str(PARENT_DIR), str(tmp_path / "out"), "--no-sort", *axes]
    assert main([*arguments, "--budget", f"half={share}"]) == 0
    assert capsys.readouterr().err == (
        f"hf-elastic elastify: budget 'half'='{share}' asks for 50% of the parent, 70.93k parameters; what was found within that has 53.42k parameters, "
        "75% of it. More choices of the axes, or more axes, come nearer.\n"
    )
    assert ElasticConfig.from_pretrained(tmp_path / "out").budgets["half"]["total_params"] == 53_416
    assert main([*arguments, "--budget", "half=12B"]) == 2
    assert "budget 'half'='12B' cuts nothing: the parent has 141.86k parameters" in capsys.readouterr().err


def test_plan_schema_and_exact_numbers(elastic, capsys):
    plan = run_json(capsys, "plan", elastic / "elastic", "--json", "--size", "hidden=40", "--size", "mamba_heads=0.5")
    assert [entry["name"] for entry in plan["budgets"]][-1] == "custom"
    for entry in plan["budgets"]:
        keys = ["name", "total_params", "active_params", "weight_bytes", "kv_bytes_per_token", "window_bytes"]
        stored = ["stored_bytes", "download_bytes", "formats"]
        assert list(entry) == [*keys, "state_bytes", *stored, "sizes", "obstacles"]
        assert set(entry["weight_bytes"]) >= {"bfloat16", "float32"}
    custom = plan["budgets"][-1]
    assert (custom["sizes"]["hidden"], custom["sizes"]["mamba_heads"]) == (40, 4)
    model = AutoModelForCausalLM.from_pretrained(elastic / "elastic", budget={"hidden": 40, "mamba_heads": 4})
    assert model.num_parameters() == custom["total_params"]


def test_plan_shows_what_a_budget_selects(elastic, capsys):
    plan = run_json(capsys, "plan", elastic / "elastic", "--json", "--budget", "100GB", "--budget", "80k")["budgets"]
    assert [entry["name"] for entry in plan[-2:]] == ["100GB", "80k"]
    assert plan[-2]["sizes"] == plan[0]["sizes"]
    assert plan[-1]["total_params"] <= 80_000
    assert main(["plan", str(elastic / "elastic"), "--budget", "3"]) != 0
    assert "no submodel fits" in capsys.readouterr().err


def test_plan_takes_a_plain_folder_with_nothing_but_a_config(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((PARENT_DIR / "config.json").read_bytes())
    plan = run_json(capsys, "plan", tmp_path, "--json", "--size", "layers=0,1,2")
    assert [entry["total_params"] for entry in plan["budgets"]][0] == 141_856
    assert plan["budgets"][1]["sizes"]["layers"] == [0, 1, 2]
    assert main(["plan", str(tmp_path)]) == 0
    assert "141.86k" in capsys.readouterr().out


def test_slice_and_export(elastic, tmp_path, capsys):
    assert main(["slice", str(elastic / "elastic"), str(tmp_path / "slice"), "--budget", "wide"]) == 0
    assert main(["export", str(tmp_path / "slice"), str(tmp_path / "plain"), "--budget", "small"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "NemotronHForCausalLM"
    direct = AutoModelForCausalLM.from_pretrained(elastic / "elastic", budget="small")
    assert all(torch.equal(direct.state_dict()[key], tensor) for key, tensor in plain.state_dict().items())
    names = [entry["name"] for entry in run_json(capsys, "plan", tmp_path / "slice", "--json")["budgets"]]
    assert names == ["wide", "small"]
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token == "<eos>"


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "fp16", "fp32"])
def test_export_in_another_type(name, elastic, tmp_path, capsys):
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(name, torch.bfloat16)
    family = str(elastic / "elastic")
    assert main(["plan", family, "--fits", "1GB", "--dtype", name]) == 0
    assert main(["export", family, str(tmp_path / "plain"), "--dtype", name]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == dtype


@pytest.mark.parametrize("command", ["slice", "elastify", "generate", "evaluate"])
def test_short_names_of_types(command, elastic, tmp_path, monkeypatch):
    """Every command that takes a type takes those of `plan`; what is loaded in is seen at the call."""
    seen = []

    def load(*args, dtype=None, **kwargs):
        seen.append(dtype)
        raise ElasticConfigError("seen")

    monkeypatch.setattr(ElasticForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(sys.modules["hf_elastic.elastification.elastify"], "load_stock", load)
    source = PARENT_DIR if command == "elastify" else elastic / "elastic"
    more = {"generate": ["^"], "evaluate": []}.get(command, [tmp_path / "out"])
    assert main([str(a) for a in (command, source, *more, "--dtype", "bf16")]) == 2
    assert seen == ["bfloat16"]


def test_a_recipe_takes_short_names_of_types(elastic, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("hf_elastic.commands.train.train", lambda arguments, *_: seen.append(arguments.dtype))
    text = f"model: {elastic / 'elastic'}\ndataset: y\nuse_cpu: true\nbf16: false\noutput_dir: {tmp_path / 'out'}\n"
    for more in ("", "dtype: null\n", "dtype: bf16\n"):
        (tmp_path / "recipe.yaml").write_text(text + more)
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert seen == ["float32", "float32", "bfloat16"]
    assert main(["train", str(tmp_path / "recipe.yaml"), "--modle", "x"]) == 2
    assert (
        "unknown option --modle; options are the fields of the recipe. Did you mean 'model'?"
        in capsys.readouterr().err
    )


def test_bf16_on_a_cpu_says_what_to_write(elastic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text(f"model: x\ndataset: y\noutput_dir: {tmp_path / 'out'}\nbf16: true\n")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert re.search("recipe.yaml: training in bf16.* write bf16: false", capsys.readouterr().err)


def test_the_api_takes_short_names_of_types(elastic):
    model = ElasticForCausalLM.from_pretrained(elastic / "elastic", budget="small", dtype="bf16")
    assert model.dtype == torch.bfloat16


def test_generate_solves_a_problem(elastic, capsys):
    problem = next(problems("heldout", 4, 0))
    result = run_json(capsys, "generate", elastic / "elastic", problem.prompt, "--json")
    assert result["text"].endswith(problem.answer)
    assert (result["budget"], result["parameters"]) == (None, 141_856)
    drafted = run_json(capsys, "generate", elastic / "elastic", problem.prompt, "--draft-budget", "small", "--json")
    assert drafted["text"] == result["text"]
    assert main(["generate", str(elastic / "elastic"), problem.prompt, "--raw", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


def test_generate_in_phases(elastic, capsys):
    """Who wrote what is said; one size in both phases writes what it writes alone."""
    problem = next(problems("heldout", 4, 0))
    alone = run_json(capsys, "generate", elastic / "elastic", problem.prompt, "--json")
    plan = ["--thinking", "full", "--answering", "full"]
    both = run_json(capsys, "generate", elastic / "elastic", problem.prompt, *plan, "--json")
    assert both["text"] == alone["text"]
    assert [phase["generated"] for phase in both["phases"]] == [[21], [7]]
    assert (
        main(
            ["generate", str(elastic / "elastic"), problem.prompt, "--thinking", "wide", "--max-thinking-tokens", "4"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("[thinking - wide]\n")
    assert "</think>\n[answering - full]\n" in out


def test_generate_with_a_plan_chosen_per_prompt(elastic, capsys):
    """A threshold that nothing reaches: the larger size answers as it does in a plan that says so."""
    problem = next(problems("heldout", 4, 0))
    source = [elastic / "elastic", problem.prompt, "--thinking", "wide", "--max-thinking-tokens", "6"]
    fixed = run_json(capsys, "generate", *source, "--answering", "full", "--json")
    choice = ["--answering", "wide", "--escalate-to", "full", "--confidence", "1", "--signal", "answer_first"]
    chosen = run_json(capsys, "generate", *source, *choice, "--json")
    assert chosen["text"] == fixed["text"]
    _, small, large = chosen["phases"]
    assert (small["generated"], small["drafted"], large["generated"]) == ([0], [1], fixed["phases"][1]["generated"])
    assert main(["generate", *map(str, source), *choice]) == 0
    assert f"(answer_first {small['confidence'][0]:.3f}: full)" in capsys.readouterr().out


def test_sampling_follows_the_seed(elastic, capsys):
    def text(seed: int) -> str:
        options = ["--temperature", "3.0", "--raw", "--max-new-tokens", "12", "--json", "--seed", seed]
        return run_json(capsys, "generate", elastic / "elastic", "^1", *options)["text"]

    assert text(1) == text(1) != text(2)


def files_of_wrong_kinds(folder: Path) -> Path:
    """What a user may take for calibration data, or for a checkpoint."""
    if folder.exists():
        return folder
    row = json.dumps({"text": "^a4b+3>"})
    (folder / "folder").mkdir(parents=True)
    (folder / "folder.jsonl").mkdir()
    (folder / "broken").mkdir()
    files = {
        "empty.jsonl": "", "empty.csv": "", "empty.parquet": "", "list.json": "[]", "header.csv": "text\n",
        "blank.txt": "\n\n", "bad.jsonl": f"{row}\n{{nope\n", "numbers.jsonl": "3\n4\n", "bad.parquet": "PAR1PAR1PAR1",
        "latin.jsonl": b'{"text": "\xff\xfe"}\n', "table.tsv": "text\n^a4b+3>\n", "null.jsonl": '{"text": null}\n',
        "deep.json": "[" * 100_000, "broken/tokenizer.json": "{}", "broken/tokenizer_config.json": "[]",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


ELASTIFY = ["elastify", "{plain}", "{tmp}/out", "--axis", "expert_ffn", "--budget", "a:expert_ffn=24"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{elastic}", "--size", "hiden=40"], "unknown axis 'hiden'.*Did you mean 'hidden'"),
        (["plan", "{elastic}", "--size", "hidden"], "must be AXIS=SIZE"),
        (["plan", "{elastic}", "--size", "hidden=many"], "'many' must be a size"),
        (["plan", "{elastic}", "--size", "hidden=40", "--size", "hidden=32"], "given twice"),
        (["plan", "{elastic}", "--size", "hidden=49"], "the parent has 48"),
        (["plan", "{tmp}/nothing"], "there is no folder"),
        (["plan", "{tmp}"], "config.json"),
        (["slice", "{elastic}", "{tmp}/out", "--budget", "smal"], "unknown budget 'smal'.*Did you mean 'small'"),
        (["slice", "{elastic}", "{tmp}/out", "--budget", "1k"], "no submodel fits"),
        (["slice", "{plain}", "{tmp}/out", "--budget", "small"], "plain nemotron_h checkpoint without budgets"),
        (
            ["generate", "{elastic}", "^", "--max-thinking-tokens", "-1"],
            "max_thinking_tokens=-1 must be a whole number",
        ),
        (["generate", "{elastic}", "^", "--handover", "cache"], "--handover needs --thinking or --answering"),
        (["generate", "{elastic}", "^", "--escalate-to", "full"], "--escalate-to needs --thinking or --answering"),
        (
            ["generate", "{elastic}", "^", "--thinking", "full", "--escalate-to", "full", "--confidence", "2"],
            r"confidence=2.0 must be a number from 0 \(never\) to 1",
        ),
        (
            ["generate", "{elastic}", "^", "--budget", "1M", "--thinking", "full"],
            "give either --budget, or --thinking",
        ),
        (["generate", "{elastic}", "", "--raw"], "prompt is empty"),
        (["generate", "{elastic}", "^", "--max-new-tokens", "0"], "must be at least 1"),
        (["generate", "{elastic}", "^", "--temperature", "-1"], "at least 0"),
        (["elastify", "{plain}", "{tmp}/out"], r"neither budgets nor axes.*\(--budget half=6B\)"),
        (
            ["elastify", "{plain}", "{tmp}/out", "--budget", "a=100k", "--calibration", "{text}"],
            r"is a target: say with axes= .*\(--axis hidden --axis \w+\); the parent has hidden, .*, layers\.",
        ),
        (
            ["elastify", "{plain}", "{tmp}/out", "--budget", "small:hidden=40"],
            r"to sort by \(--calibration FILE, --scores FILE\), or sort=False \(--no-sort\)",
        ),
        (["elastify", "{plain}", "{tmp}/out", "--budget", "small"], "must be NAME:AXIS=SIZE"),
        (
            ["elastify", "{plain}", "{tmp}/out", "--budget", "a:hidden=40", "--calibration", "{tmp}/no.jsonl"],
            "does not exist",
        ),
        (["elastify", "{plain}", "{tmp}/out", "--budget", "a=1k", "--save-scores", "x"], "--save-scores needs"),
        (["generate", "{elastic}", "^", "--device", "cudaa"], "--device='cudaa' cannot be used"),
        (["generate", "{elastic}", "^", "--device", "xpu:7"], "--device='xpu:7' cannot be used"),
        (["elastify", "{plain}", "{tmp}/out", "--device", "cudaa"], "--device='cudaa' cannot be used"),
        (["slice", "{elastic}", "{elastic}", "--budget", "small"], "is the checkpoint that is read, and would be"),
        (["export", "{elastic}", "{elastic}", "--budget", "small"], "is the checkpoint that is read, and would be"),
        (["elastify", "{plain}", "{plain}", "--axis", "hidden"], "is the checkpoint that is read, and would be"),
        (["elastify", "{plain}", "{elastic}/config.json", "--axis", "hidden"], "is a file; give a folder"),
        (["elastify", "{plain}", "{tmp}/out", "--spec", "{text}"], "text.jsonl is no JSON: Extra data"),
        (["elastify", "{plain}", "{tmp}/out", "--spec", "{lists}"], "must hold an object with `axes` and `budgets`"),
        (
            ["elastify", "{plain}", "{tmp}/out", "--calibration", "{text}", "--save-scores", "{tmp}/no/where"],
            "there is no such folder",
        ),
        (["plan", "{elastic}", "--size", "layers=4"], "layers=4 is a number.*list the layers to keep"),
        (["lab", "--output", "{tmp}/out", "--size", "6"], "--size=6 must be in 1..5, the people"),
        (
            ["lab", "--output", "{tmp}/out", "--task", "book", "--letters", "13"],
            "--size=13 must be in 4..12, the letters",
        ),
        (["lab", "--output", "{tmp}/out", "--quantize"], "--quantize is for --task book"),
        (["lab", "--output", "{tmp}/out", "--problems", "0"], "--problems=0 must be at least 1"),
        (["lab", "--output", "{text}"], "text.jsonl is a file; give a folder"),
        *(
            ([command, "{elastic}", *more, "--dtype", name], f"--dtype='{name}' must be auto or a floating-point type")
            for command, more in (
                ("slice", ["{tmp}/out"]),
                ("export", ["{tmp}/out"]),
                ("generate", ["^"]),
                ("evaluate", []),
            )
            for name in ("", "foo", "int8", "cuda")
        ),
        *(([*ELASTIFY, "--calibration", "{text}", "--dtype", name], "--dtype=") for name in ("", "foo", "int8")),
        *(
            ([*ELASTIFY, "--calibration", f"{{files}}/{name}"], message)
            for name, message in {
                "empty.jsonl": "empty.jsonl is empty",
                "empty.csv": "empty.csv is empty",
                "empty.parquet": "empty.parquet is empty",
                "list.json": "list.json cannot be read as a dataset: it has no rows",
                "header.csv": "header.csv cannot be read as a dataset: it has no rows",
                "blank.txt": "calibration has no rows with tokens",
                "bad.jsonl": "bad.jsonl cannot be read as a dataset: JSON parse error.* in row 1",
                "numbers.jsonl": "numbers.jsonl cannot be read as a dataset: JSON parse error",
                "bad.parquet": "bad.parquet cannot be read as a dataset: Parquet",
                "latin.jsonl": "calibration row 0 is no UTF-8 text",
                "table.tsv": "table.tsv must end with .jsonl, .json, .parquet, .csv, .txt",
                "folder": "folder cannot be read as a dataset: .*neither a",
                "folder.jsonl": "does not exist",
                "nothing": "there is no file or folder .*nothing",
                "null.jsonl": "calibration row 0: text=None must be a text",
            }.items()
        ),
        ([*ELASTIFY, "--spec", "{files}/deep.json"], "deep.json is no JSON: maximum recursion depth"),
        (["elastify", "{files}/nothing", "{tmp}/out", "--axis", "hidden"], "there is no folder"),
        (["elastify", "{text}", "{tmp}/out", "--axis", "hidden"], "is a file; give the folder of a checkpoint"),
        (["slice", "{text}", "{tmp}/out"], "is a file; give the folder of a checkpoint"),
        (["export", "./nothing", "{tmp}/out"], "there is no folder ./nothing"),
        *(
            ([command, f"{{files}}/{name}", *more], message)
            for command, more in (("generate", ["^"]), ("evaluate", ["--count", "1"]))
            for name, message in {
                "nothing": "there is no folder",
                "bad.jsonl": "is a file; give the folder of a checkpoint",
                "folder": r"folder has no tokenizer that can be loaded \(there are no files of one\)",
                "broken": r"broken has no tokenizer that can be loaded \(.+\)\. Save the one",
            }.items()
        ),
    ],
)
def test_mistakes_are_explained_without_a_traceback_and_write_nothing(arguments, message, elastic, tmp_path, capsys):
    places = {"elastic": elastic / "elastic", "tmp": tmp_path, "plain": PARENT_DIR, "text": elastic / "text.jsonl"}
    places |= {"files": files_of_wrong_kinds(elastic / "files"), "lists": elastic / "lists.json"}
    places["lists"].write_text('{"budgets": [1]}')
    capsys.readouterr()
    assert main([a.format(**places) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"hf-elastic {arguments[0]}: " in error
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("x"), 1, "hf-elastic plan: unexpected KeyError: 'x' (`hf-elastic --debug plan ...` shows where"),
        (RuntimeError("CUDA out of memory"), 1, "unexpected RuntimeError: CUDA out of memory"),
        (AssertionError(), 1, "unexpected AssertionError"),
        (StopIteration(), 1, "unexpected StopIteration"),
        (RecursionError("too deep"), 1, "unexpected RecursionError: too deep"),
        (SafetensorError("header too large"), 2, "hf-elastic plan: header too large"),
        (DatasetGenerationError("no rows"), 2, "hf-elastic plan: no rows"),
        (ArrowInvalid("no parquet"), 2, "hf-elastic plan: no parquet"),
        (YAMLError("a tab"), 2, "hf-elastic plan: a tab"),
        (OSError("disk full"), 2, "hf-elastic plan: disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_no_error_is_a_traceback_without_debug(error, code, message, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("hf_elastic.commands.plan.run", run)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert main(["plan", "x"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == bool(message)
    if not isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
        for argv in (["--debug", "plan", "x"], ["plan", "x", "--debug"]):
            with pytest.raises(type(error)):
                main(argv)


def test_a_size_of_a_nested_family_says_where_its_tokenizer_is(elastic, tmp_path, capsys):
    ElasticForCausalLM.from_pretrained(elastic / "elastic").save_pretrained(tmp_path / "nested", layout="nested")
    AutoTokenizer.from_pretrained(elastic / "elastic").save_pretrained(tmp_path / "nested")
    size = tmp_path / "nested" / "budgets" / "small"
    assert size.is_dir()
    assert main(["generate", str(size), "^"]) == 2
    error = capsys.readouterr().err
    assert "small has no tokenizer that can be loaded (there are no files of one)" in error
    assert error.strip().endswith(f"the one of the family lies in {tmp_path / 'nested'}.")


DAMAGED = [
    ("tokenizer.json", "{", "tokenizer.json cannot be read as JSON"),
    ("tokenizer.json", "[]", r"tokenizer.json holds a list, \[\], it must hold a JSON object"),
    ("tokenizer.json", "{}", r"tokenizer of \S+ \(tokenizer.json, .*\) cannot be loaded"),
    ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read as JSON"),
    ("tokenizer_config.json", "null", "tokenizer_config.json holds null, it must"),
    ("tokenizer_config.json", '{"a":' * 3000 + "1" + "}" * 3000, "tokenizer_config.json cannot be read as JSON"),
    ("special_tokens_map.json", "[1]", r"special_tokens_map.json holds a list, \[1\]"),
]


@pytest.mark.parametrize(("name", "text", "message"), DAMAGED, ids=[f"{d[0]}-{d[1][:4]}" for d in DAMAGED])
def test_a_damaged_tokenizer_is_not_left_out_without_a_word(name, text, message, elastic, tmp_path, capsys):
    for source, like in (("family", elastic / "elastic"), ("plain", PARENT_DIR)):
        shutil.copytree(like, tmp_path / source)
        (tmp_path / source / name).write_text(text)
    family, out = str(tmp_path / "family"), tmp_path / "out"
    elastify = ["elastify", str(tmp_path / "plain"), str(out), "--no-sort", "--budget", "half:expert_ffn=16"]
    runs = [["slice", family, str(out), "--budget", "small"], elastify, ["push", family, "me/x", "--budget", "small"]]
    if text != "{}":  # which no program loads, but which is sound JSON
        runs += [["export", family, str(out), "--budget", "small"], ["push", family, "me/x", "--layout", "stock"]]
    for arguments in runs:
        assert main(arguments) == 2, arguments
        assert re.search(message, capsys.readouterr().err), arguments
        assert not out.exists()


@pytest.mark.parametrize(("template", "why"), [("{{ x.y }}", "'x' is undefined"), ("{{ }}", "Expected an expression")])
def test_a_damaged_chat_template_says_how_to_do_without(template, why, elastic, tmp_path, capsys):
    shutil.copytree(elastic / "elastic", tmp_path / "family")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "family")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "family"), "^a4b+3>"]) == 2
    told = rf"the chat template of \S*family cannot be used: .*{why}.*; --raw does without it\."
    assert re.search(told, capsys.readouterr().err)
    assert main(["generate", str(tmp_path / "family"), "^a4b+3>", "--raw", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("arguments", [["generate", "{}", "^"], ["evaluate", "{}"], ["slice", "{}", "{}/out"]])
def test_a_damaged_config_is_named_before_the_tokenizer(arguments, elastic, tmp_path, capsys):
    shutil.copytree(elastic / "elastic", tmp_path / "family")
    (tmp_path / "family" / "config.json").write_text("null")
    assert main([text.format(tmp_path / "family") for text in arguments]) == 2
    error = capsys.readouterr().err
    assert "config.json holds null, it must hold a JSON object" in error
    assert "tokenizer" not in error


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused_before_anything_is_loaded(elastic, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager  # lm-eval's own tasks take seconds to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(manager, include_defaults=False))
    monkeypatch.setattr(ElasticForCausalLM, "from_pretrained", None)
    assert main(["evaluate", str(elastic / "elastic"), "--task", "zz"]) == 2
    assert "lm-eval has no task 'zz'" in capsys.readouterr().err


def test_no_tokenizer_at_all_needs_no_word(elastic, tmp_path, capsys):
    source = tmp_path / "family"
    shutil.copytree(elastic / "elastic", source, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    for command in ("slice", "export"):
        assert main([command, str(source), str(tmp_path / command), "--budget", "small"]) == 0
        assert not list((tmp_path / command).glob("*token*"))
    assert not capsys.readouterr().err


def test_sizes_and_budgets_from_text():
    assert parse_sizes(["hidden=40", "ffn=0.5", "layers=0,2"]) == {"hidden": 40, "ffn": 0.5, "layers": [0, 2]}
    assert parse_budget("a:hidden=40,ffn=0.5") == ("a", {"hidden": 40, "ffn": 0.5})
    assert parse_budget("a=2.1B active") == ("a", "2.1B active")
    with pytest.raises(ElasticConfigError):
        parse_budget("=6B")


def test_tables_are_aligned():
    assert table([["a", "n"], ["long", "1"], ["b", "22"]], right=frozenset({1})).splitlines() == [
        "a      n",
        "----  --",
        "long   1",
        "b     22",
    ]


@pytest.mark.slow
def test_help_as_users_call_it(capsys):
    done = subprocess.run([sys.executable, "-m", "hf_elastic.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    for command in COMMANDS:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^0$"):
            main([command, "--help"])
        assert f"hf-elastic {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_train_reads_a_recipe_and_saves_the_family(elastic, tmp_path):
    recipe = f"""
model: {elastic / "elastic"}
dataset: {elastic / "text.jsonl"}
output_dir: {tmp_path / "out"}
max_steps: 2
per_device_train_batch_size: 2
learning_rate: 0.01
use_cpu: true
bf16: false
report_to: none
save_strategy: "no"
budget_probabilities: {{small: 1.0}}
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    with torch.enable_grad(), pytest.warns(UserWarning, match="the whole parent .'full'. is never drawn"):
        assert main(["train", str(tmp_path / "recipe.yaml"), "--max_steps", "1"]) == 0
    before = AutoModelForCausalLM.from_pretrained(elastic / "elastic", budget="small").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", budget="small").state_dict()
    assert any(not torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.slow
def test_train_reads_the_fields_of_lora_and_merges(elastic, tmp_path):
    recipe = f"""
model: {elastic / "elastic"}
dataset: {elastic / "text.jsonl"}
output_dir: {tmp_path / "out"}
max_steps: 1
per_device_train_batch_size: 2
learning_rate: 0.1
use_cpu: true
bf16: false
report_to: none
save_strategy: "no"
use_peft: true
budget_probabilities: {{small: 1.0}}
lora_r: 2
lora_target_modules: [q_proj, in_proj]
merge_adapter: true
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    with torch.enable_grad(), pytest.warns(UserWarning, match="the whole parent .'full'. is never drawn"):
        assert main(["train", str(tmp_path / "recipe.yaml"), "--lora_alpha", "8"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert not (tmp_path / "out" / "config.json").exists()
    before = AutoModelForCausalLM.from_pretrained(elastic / "elastic").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").state_dict()
    changed = {key.split(".")[-2] for key, tensor in after.items() if not torch.equal(before[key], tensor)}
    assert changed == {"q_proj", "in_proj"}
    base = AutoModelForCausalLM.from_pretrained(elastic / "elastic")
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in after.items())


@pytest.mark.slow
def test_train_tells_what_the_router_decided(elastic, tmp_path, capsys):
    model = ElasticForCausalLM.from_pretrained(elastic / "elastic")
    choices = {"hidden": [48, 40, 32, 24], "expert_ffn": [32, 24, 16, 8]}
    model.elastic_config = ElasticConfig.from_parent(model.config, {}, choices=choices)
    model.save_pretrained(tmp_path / "open")
    AutoTokenizer.from_pretrained(elastic / "elastic").save_pretrained(tmp_path / "open")
    recipe = f"""
model: {tmp_path / "open"}
dataset: {elastic / "text.jsonl"}
output_dir: {tmp_path / "out"}
max_steps: 2
router_steps: 1
router_targets: {{half: 0.5}}
per_device_train_batch_size: 2
use_cpu: true
bf16: false
report_to: none
save_strategy: "no"
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    with torch.enable_grad():
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "router_report.json").read_text())
    assert f"see {tmp_path / 'out' / 'router_report.json'}" in printed
    assert f"budget half: target {row['target']}, {100 * row['miss']:+.1f} % off by the exact count" in printed
    assert row["why"] in printed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", budget="half")
    assert loaded.num_parameters() == row["cost"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "there is no file .*recipe.yaml, and no recipe of this name in the package, which has granite4"),
        (
            "output_dir: {tmp}/out\nbf16: false\nuse_cpu: true\nmodel: {model}\ndataset: {tmp}/none.jsonl\n",
            "train: file .*none.jsonl does not exist",
        ),
        ("output_dir: {tmp}/out\nuse_cpu: true\nbf16: false\n", "does not say model"),
        (
            "output_dir: {tmp}/out\nbf16: false\nmodel: x\ndataset: y\ntemperature: 0\n",
            "temperature=0.*must be a finite number above 0",
        ),
        ("a: [1\nb", r"recipe.yaml is no YAML: while parsing a flow sequence .*line 1"),
        ("a:\n\t- b", r"recipe.yaml is no YAML: .*cannot start any token"),
        ("- 1\n", "recipe.yaml holds list, it must hold lines of KEY: VALUE"),
        ("3: 4\n", "unknown key 3 in .*recipe.yaml; it takes model, dataset"),
        (
            "output_dir: {tmp}/out\nbf16: false\nuse_cpu: true\nnonsense: 3\n",
            "unknown key 'nonsense' in .*recipe.yaml; it",
        ),
        ("foo: bar\n", "unknown key 'foo' in .*recipe.yaml; it takes model, dataset, .*ElasticDistillationConfig"),
        ("modle: x\n", "unknown key 'modle' .*Did you mean 'model'"),
        (
            "output_dir: {tmp}/out\nmax_steps: many\n",
            r"recipe.yaml: argument --max_steps.*: invalid int value: 'many'",
        ),
        ("output_dir: {tmp}/out\nbf16: false\nlearning_rate: [1]\n", r"learning_rate=\[1\] must be a number"),
        ("output_dir: {tmp}/out\nbf16: false\nmodel: 3\ndataset: y\n", "model=3 must be a text"),
        (
            "output_dir: {tmp}/out\nbf16: false\nuse_cpu: true\nmodel: {tmp}/nothing\ndataset: {data}\n",
            "there is no folder .*nothing",
        ),
        (
            "output_dir: {tmp}/out\nbf16: false\nuse_cpu: true\nmodel: {model}\ndataset: {data}\ndtype: foo\n",
            "dtype='foo' must be",
        ),
    ],
)
def test_recipes_that_do_not_hold_together(recipe, message, elastic, tmp_path, capsys):
    if recipe is not None:
        places = {"tmp": tmp_path, "model": elastic / "elastic", "data": elastic / "text.jsonl"}
        (tmp_path / "recipe.yaml").write_text(recipe.format(**places))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert "usage:" not in error
    assert not (tmp_path / "out").exists()
