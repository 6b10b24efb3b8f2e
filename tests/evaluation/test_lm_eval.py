"""Programs that never import this package: trust_remote_code, lm-eval from its command line, `transformers serve`. Nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from cases import VOCAB
from compare import assert_same_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_elastic import ElasticConfigError, ElasticForCausalLM
from hf_elastic.configuration.remote_code import AUTO_MAP
from hf_elastic.evaluation.lm_eval import evaluate_with_lm_eval

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def repository(family_folder, tmp_path_factory):
    """A saved family with a tokenizer of one word per id, and a task of 24 questions with four answers each."""
    folder = tmp_path_factory.mktemp("repository")
    ElasticForCausalLM.from_pretrained(family_folder("nano3")).save_pretrained(folder)
    names = ["<unk>", "<eos>", *(f"t{i}" for i in range(2, VOCAB))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    tasks = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(5)
    questions = []
    for _ in range(24):
        ids = torch.randint(2, VOCAB, (9,), generator=generator).tolist()
        answers = [f"t{i}" for i in ids[5:]]
        questions.append({"prompt": " ".join(f"t{i}" for i in ids[:5]), "choices": answers, "answer": ids[0] % 4})
    (tasks / "questions.json").write_text("\n".join(map(json.dumps, questions)))
    (tasks / "words.yaml").write_text(TASK.format(data=tasks / "questions.json"))
    return folder, tokenizer, tasks, questions


def by_hand(model, tokenizer, questions) -> float:
    """Share of questions whose right answer has the largest probability."""
    right = 0
    for question in questions:
        prompt = tokenizer(question["prompt"], return_tensors="pt").input_ids
        scores = model(prompt, use_cache=False).logits[0, -1]
        choices = [scores[int(answer[1:])].item() for answer in question["choices"]]
        right += choices.index(max(choices)) == question["answer"]
    return right / len(questions)


def test_the_checkpoint_says_where_its_classes_are(repository, tmp_path):
    folder, *_ = repository
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    small = ElasticForCausalLM.from_pretrained(folder, budget="small", trust_remote_code=True)
    small.save_pretrained(tmp_path / "slice")
    assert (tmp_path / "slice" / "modeling_elastic.py").read_text() == (folder / "modeling_elastic.py").read_text()
    small.export(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_tasks_run_at_the_active_budget(repository):
    pytest.importorskip("lm_eval")
    folder, tokenizer, tasks, questions = repository
    family = ElasticForCausalLM.from_pretrained(folder)
    found = {}
    options = {"include_path": tasks, "include_defaults": False, "bootstrap_iters": 0}
    for budget in (None, "small"):
        with family.at(budget):
            found[budget] = evaluate_with_lm_eval(family, tokenizer, "words", **options)
            assert found[budget]["words"]["acc,none"] == pytest.approx(by_hand(family, tokenizer, questions))
            few = evaluate_with_lm_eval(family, tokenizer, ["words"], limit=10, **options)
            assert few["words"]["acc,none"] == pytest.approx(by_hand(family, tokenizer, questions[:10]))
    assert found[None]["words"]["acc,none"] != found["small"]["words"]["acc,none"]
    with pytest.raises(ElasticConfigError, match="lm-eval has no task 'word'. Did you mean 'words'"):
        evaluate_with_lm_eval(family, tokenizer, "word", **options)


PROGRAM = """
import functools, sys
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

repository, again = sys.argv.pop(1), sys.argv.pop(1)
# lm-eval's own tasks, thousands of files that take seconds to read, are left out; otherwise as `lm_eval` starts.
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
assert not any(name.startswith("hf_elastic") for name in sys.modules)
cli_evaluate()

model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, budget="small")
assert model.budget == "small", model.budget
assert type(model).__module__ == "hf_elastic.modeling_elastic", type(model)
model.save_pretrained(again)

for name in [name for name in sys.modules if name.startswith("hf_elastic") or "transformers_modules" in name]:
    del sys.modules[name]
sys.modules["hf_elastic"] = None  # not installed
CONFIG_MAPPING._extra_content.pop("elastic")
try:
    AutoConfig.from_pretrained(repository, trust_remote_code=True)
except ImportError as error:
    assert "pip install hf-elastic" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_a_program_that_never_imports_this_package(repository, tmp_path):
    """lm-eval from its command line, then the AutoClasses; saved again there is no other code; without the package, how to get it is said."""
    pytest.importorskip("lm_eval")
    folder, tokenizer, tasks, questions = repository
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(folder),
        str(tmp_path / "again"),
        "--model",
        "hf",
        "--tasks",
        "words",
    ]
    command += ["--model_args", f"pretrained={folder},budget=small,trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    env = {**OFFLINE, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("*.json")).read_text())["results"]
    small = AutoModelForCausalLM.from_pretrained(folder, budget="small")
    assert results["words"]["acc,none"] == pytest.approx(by_hand(small, tokenizer, questions))
    assert [file.name for file in (tmp_path / "again").glob("*.py")] == ["modeling_elastic.py"]
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), small)


SERVER = """
import sys
import torch
from transformers.cli.serving.model_manager import ModelManager

assert not any(name.startswith("hf_elastic") for name in sys.modules)
manager = ModelManager(device="cpu", trust_remote_code=True)
where = ModelManager.process_model_name(sys.argv[1])
processor, model = manager._load_processor(where), manager._load_model(where)
print(type(model).__name__, model.num_parameters(), manager.get_model_modality(model, processor))
inputs = processor("t5 t6 t7", return_tensors="pt")
print(model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, eos_token_id=None, tokenizer=processor)[0].tolist())
"""


@pytest.mark.slow
def test_transformers_serves_a_family(repository, tmp_path):
    """Its loader as the server calls it, which no program of the package's own has prepared."""
    folder, *_ = repository
    env = {**OFFLINE, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SERVER, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    family = ElasticForCausalLM.from_pretrained(folder)
    kind, text = done.stdout.splitlines()[-2:]
    assert kind == f"ElasticNemotronHForCausalLM {family.num_parameters()} Modality.LLM"
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert json.loads(text) == family.generate(torch.tensor([[5, 6, 7]]), **options)[0].tolist()
