"""Model cards, and pushing with them: every number against the files and models it is of, the metadata against huggingface_hub's own reader."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from cases import BUDGETS
from compare import assert_same_weights
from huggingface_hub import InferenceClient, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from published import lfm2_8b, llama31_8b
from transformers import AutoModelForCausalLM, NemotronHForCausalLM, Qwen3NextConfig

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.checkpoints.downloads import download_bytes
from hf_elastic.cli import main
from hf_elastic.configuration.budgets import format_bytes, format_count
from hf_elastic.evaluation.plans import measure_plan, plan_matrix, results_file
from hf_elastic.hub.cards import MARKER, RELATION, render_card
from hf_elastic.hub.publishing import README, CardArguments, prepare_upload
from hf_elastic.lab.book_task import BookTask
from hf_elastic.lab.family import FAMILY_DIR, load_family
from hf_elastic.lab.parent import PARENT_DIR

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "lab_family.json"
PLANS, PARENT = "plans.json", "org/parent"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab's family in both layouts, an export, and the results of three plans."""
    folder = tmp_path_factory.mktemp("cards")
    family, tokenizer = load_family()
    family.save_pretrained(folder / "nested", layout="nested")
    family.save_pretrained(folder / "stock")
    (folder / "stock/notes.txt").write_text("notes")
    tokenizer.save_pretrained(folder / "nested")
    ElasticForCausalLM.from_pretrained(folder / "stock", budget="third").export(folder / "export")
    plans = [*plan_matrix(["full", "half"], ["full"], [None]), *plan_matrix(["half"], ["half"], [None])]
    points = [measure_plan(family, tokenizer, BookTask(letters=2, count=2), plan) for plan in plans]
    results = results_file("lab", "book", points, "cost") | {"commit": "0123456789abcdef"}
    (folder / PLANS).write_text(json.dumps(results))
    return folder


def nested(lab) -> ElasticConfig:
    return ElasticConfig.from_pretrained(lab / "nested")


def section(card: ModelCard, name: str) -> str:
    return card.text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def rows(text: str, first: str) -> list[dict[str, str]]:
    """The table whose first column is called `first`."""
    lines = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(map(str.strip, head), row, strict=True)) for row in body]


# What a card says


def test_costs_are_those_of_the_models_and_of_the_files(lab):
    table = {row["size"]: row for row in rows(section(render_card(nested(lab)), "Sizes"), "size")}
    assert list(table) == ["full", "half", "third", "quarter"]
    fetched = 0
    for name in reversed(table):
        model = AutoModelForCausalLM.from_pretrained(lab / "stock", budget=name)
        fetched += sum(file.stat().st_size for file in (lab / "nested/budgets" / name).glob("*.safetensors"))
        assert table[name]["parameters"] == format_count(model.num_parameters())
        assert table[name]["float32"] == format_bytes(sum(t.nbytes for t in model.state_dict().values()))
        assert table[name]["download"] == format_bytes(fetched)
        cost = model.elastic_config.costs()[next(iter(model.elastic_config.family()))]
        assert table[name]["active"] == format_count(cost.active_params)
        assert (table[name]["KV per token"], table[name]["states"]) == tuple(
            format_bytes(size) for size in (cost.kv_bytes_per_token(), cost.state_bytes())
        )
    assert table["half"]["sizes"] == "hidden 32, expert_ffn 16, shared_expert_ffn 32"
    in_one = ElasticConfig.from_pretrained(lab / "stock")
    stock = rows(section(render_card(in_one), "Sizes"), "size")
    assert stock[0]["download"] == stock[0]["float32"]
    for row in stock[1:]:
        fetched = download_bytes(in_one, in_one.submodel(row["size"]))
        assert row["download"] == f"≥ {format_bytes(fetched)}"
        assert fetched > in_one.costs()[row["size"]].weight_bytes(torch.float32), "whole rows"
    config = nested(lab)
    config.elastic["files"]["quarter"]["budgets/quarter/model.safetensors"] += 10**9  # which all of them download
    assert all("GB" in row["download"] for row in rows(section(render_card(config), "Sizes"), "size"))


def test_scores_are_those_of_the_results_files(lab, tmp_path):
    files = [f"{MEASURED}::family: *, exact", lab / PLANS]
    card = render_card(nested(lab), results=files)
    text = section(card, "Results")
    measured = {entry["name"]: entry for entry in json.loads(MEASURED.read_text())["measurements"]}
    shown = rows(text, "measured")
    assert [row["measured"] for row in shown] == [name for name in measured if re.fullmatch("family: .*, exact", name)]
    for row in shown:
        assert row["median"] == f"{measured[row['measured']]['median']:.4g}"
        assert row["runs"] == str(len(measured[row["measured"]]["runs"]))
    plans = json.loads((lab / PLANS).read_text())
    best = rows(text, "thinks")
    assert [row["accuracy"] for row in best] == [f"{plans['points'][i]['accuracy']:.4g}" for i in plans["front"]]
    commits = [json.loads(MEASURED.read_text())["commit"][:12], "0123456789ab"]
    for name, commit in zip((MEASURED.name, PLANS), commits, strict=True):
        assert re.search(rf"<sub>from \[`{name}`\]\(results/{name}\); sha256 [0-9a-f]{{12}}; commit {commit}", text)
    assert "Not measured on their own" not in card.text
    assert "Not measured on their own: third, quarter." in render_card(nested(lab), results=files[1:]).text
    plans["points"][0]["metrics"]["exact"] = 0.12345
    (tmp_path / PLANS).write_text(json.dumps(plans))
    changed = render_card(nested(lab), results=[files[0], tmp_path / PLANS])
    assert "| full | " in section(changed, "Results")
    assert "0.1235" in changed.text
    assert "0.1235" not in card.text
    values = {e.metric_name: e.metric_value for e in changed.data.eval_results}
    assert values["exact, full"] == 0.12345
    assert set(values) == {f"{metric}, {size}" for metric in ("code", "exact", "trace") for size in ("full", "half")}
    without = render_card(nested(lab))
    assert not section(without, "Results")
    assert "Nothing was measured here" in without.text
    record = json.loads((FAMILY_DIR / "training.json").read_text())
    shipped = render_card(nested(lab), results=[FAMILY_DIR / "training.json"])
    for entry in record["evaluation"]["budgets"]:
        assert (
            f"| {entry['name']} | {entry['exact']:.4g} | {entry['trace']:.4g} | {entry['code']:.4g} |" in shipped.text
        )
    record = {"seed": 3, "evaluation": {"count": 7, "budgets": [{"name": "half", "exact": 0.625}]}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    trained = render_card(nested(lab), results=[tmp_path / "training.json"])
    assert rows(trained.text, "size")[0]["size"] == "full"
    assert "count 7, seed 3" in trained.text
    assert "| half | 0.625 |" in trained.text
    assert "commit not recorded" in trained.text


@pytest.mark.parametrize(
    ("parent", "tags"),
    [
        (llama31_8b(), ["llama"]),
        (lfm2_8b(), ["lfm2_moe", "moe"]),
        (Qwen3NextConfig(), ["qwen3_next", "moe"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_tags_say_what_the_layers_are(parent, tags):
    card = render_card(ElasticConfig.from_parent(parent, {"half": {"hidden": 1024}}), repo_id="org/x")
    assert card.data.tags == ["elastic", "matryoshka", "hf_elastic", *tags]


def test_metadata_is_what_huggingface_hub_reads(lab, local_hub, caplog):
    about = {"repo_id": "org/lab", "base_model": PARENT, "license": "apache-2.0", "tags": ["mine"]}
    card = render_card(nested(lab), results=[lab / PLANS], **about)
    read = ModelCard(str(card))
    assert read.data.to_dict() == card.data.to_dict()
    fields = read.data.to_dict()
    assert hasattr(InferenceClient, fields["pipeline_tag"].replace("-", "_"))  # a task that the Hub's client knows
    assert (fields["library_name"], fields["license"]) == ("transformers", "apache-2.0")
    assert (fields["base_model"], fields["base_model_relation"]) == (PARENT, RELATION)
    assert fields["tags"] == ["elastic", "matryoshka", "hf_elastic", "nemotron_h", "mamba", "moe", "mine"]
    name, results = model_index_to_eval_results(fields["model-index"])
    assert (name, {r.dataset_name for r in results}) == ("lab", {"book"})
    assert results == card.data.eval_results
    card.validate()  # posts to the Hub; the local one checks a part of what the real one does
    card.data.base_model_relation = "part"
    with pytest.raises(ValueError, match="base_model_relation"):
        card.validate()
    assert "license" not in caplog.text
    bare = render_card(nested(lab)).data.to_dict()
    assert not {"license", "base_model", "base_model_relation", "model-index", "model_name"} & bare.keys()
    assert "the card says no license" in caplog.text


def test_tags_and_limits_follow_the_architecture(original):
    config = ElasticConfig.from_parent(original("nano3").config, BUDGETS["nano3"])
    card = render_card(config, repo_id="org/x")
    assert "The sizes of medium differ per layer" in card.text
    assert "moe" in card.data.tags
    dense = ElasticConfig.from_parent(original("nano2").config, {"half": {"hidden": 24}})
    assert "moe" not in render_card(dense).data.tags


def test_what_is_refused(lab, tmp_path, original):
    def refuse(message, source=None, **arguments):
        with pytest.raises(ElasticConfigError, match=message):
            render_card(source or nested(lab), **arguments)

    refuse(
        "a card is of an elastic checkpoint, or of an export of one .*, and this NemotronHConfig is of neither",
        original("nano3").config,
    )
    refuse("base_model='parent' must be a repository", base_model="parent")
    refuse("license='Apache 2' must be an identifier", license="Apache 2")
    refuse("license='other' needs license_name", license="other")
    refuse("go with license='other', not with 'mit'", license="mit", license_name="mine")
    refuse("cannot be read as a results file", results=[tmp_path / "nothing.json"])
    refuse("must be a list of paths", results=str(MEASURED))
    refuse("is no results file", results=[lab / "nested" / "config.json"])
    refuse("no measurement of .* matches 'famly: \\*'", results=[f"{MEASURED}::famly: *"])
    refuse("two results files are called lab_family.json", results=[f"{MEASURED}::family: *", f"{MEASURED}::alone: *"])
    refuse("'router: half, exact' has total_params=.* it is of another family", results=[MEASURED])
    refuse("recipe=.* cannot be read", recipe=tmp_path / "nothing.yaml")
    plans = json.loads((lab / PLANS).read_text())
    plans["points"][0]["answering"] = "fulll"
    (tmp_path / "other.json").write_text(json.dumps(plans))
    refuse("measures 'fulll', which is no budget here .* Did you mean 'full'", results=[tmp_path / "other.json"])
    (tmp_path / "half.json").write_text('{"points": [{}], "task": "book"}')
    refuse("half.json is no complete results file: KeyError", results=[tmp_path / "half.json"])


def test_templates_are_in_the_package():
    for name in ("family.md", "slice.md"):
        packaged = resources.files("hf_elastic.model_cards").joinpath(name).read_text()
        assert packaged == (ROOT / "model_cards" / name).read_text()
        assert re.search(rf'"hf_elastic.model_cards" = .*"{name}"', (ROOT / "pyproject.toml").read_text())


# Pushing


@pytest.fixture
def push(local_hub, monkeypatch, capsys):
    """`hf-elastic push`: exit status, and what it printed."""

    def push(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["push", *map(str, arguments)])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    monkeypatch.setenv("HF_TOKEN", "hf_local")
    return push


def files(hub, repo: str) -> dict:
    repository = hub.repositories[repo]
    return repository.commits[repository.refs["main"]]


def load_code(hub, repo: str) -> str:
    return re.search(
        "```python\n(.*?)```", section(ModelCard(files(hub, repo)["README.md"].decode()), "How to load"), re.DOTALL
    )[1]


def test_nothing_is_uploaded_without_being_told(lab, push, local_hub):
    before = {file: file.stat().st_mtime_ns for file in lab.rglob("*")}
    for source, budgets in (
        (lab / "nested", ["half", "quarter"]),
        (lab / "stock", ["half", "quarter"]),
        (lab / "export", []),
    ):
        status, shown = push(
            source, "org/new", "--base-model", PARENT, "--license", "mit", "--results", f"{MEASURED}::family: f*, code"
        )
        if (
            source.name == "export"
        ):  # the third has other budgets than what is measured, but none by that name that differs
            assert status == 2
            assert "it is of another family" in shown
            status, shown = push(source, "org/new")
        assert status == 0
        assert "nothing was uploaded" in shown
        assert "README.md is new" in shown
        assert all(re.search(rf"^{name} +[\d.]+ kB$", shown, re.MULTILINE) for name in budgets)
        if source.name != "stock":
            for file in source.rglob("*"):
                if file.is_file():
                    size = f"{file.stat().st_size:,}"
                    assert re.search(rf"^{file.relative_to(source)} +{size}$", shown, re.MULTILINE)
        else:
            assert "budgets/quarter/model.safetensors" in shown, "the layout for the Hub"
            assert re.search("^notes.txt +5$", shown, re.MULTILINE)
    assert "org/new" not in local_hub.repositories
    assert not [request for request in local_hub.requests if not request.startswith(("GET", "HEAD"))]
    assert {file: file.stat().st_mtime_ns for file in lab.rglob("*")} == before


def test_a_family_its_slice_and_its_export_are_pushed_and_pulled(lab, push, local_hub, tmp_path):
    for path in ("optimizer.pt", "checkpoint-7/config.json", ".git/config", "pictures/chart.png"):
        (tmp_path / "family" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "family" / path).write_text("x")
    for file in (lab / "nested").rglob("*.*"):
        (tmp_path / "family" / file.relative_to(lab / "nested")).parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            (tmp_path / "family" / file.relative_to(lab / "nested")).write_bytes(file.read_bytes())
    (tmp_path / "recipe.yaml").write_text("steps: 4321\n")
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent/README.md").write_text("---\nlicense: mit\nbase_model: org/grandparent\n---\n# Parent\n")
    local_hub.commit(PARENT, tmp_path / "parent")
    arguments = ["--base-model", PARENT, "--results", lab / PLANS, "--recipe", tmp_path / "recipe.yaml", "--upload"]
    status, shown = push(tmp_path / "family", "org/family", *arguments)
    assert status == 0, shown
    assert "left out: .git, checkpoint-7, optimizer.pt" in shown
    there = files(local_hub, "org/family")
    own = {f.relative_to(lab / "nested").as_posix() for f in (lab / "nested").rglob("*") if f.is_file()}
    assert there.keys() == own | {"README.md", "pictures/chart.png", f"results/{PLANS}"}
    card = ModelCard(there["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", PARENT)
    assert "```yaml\nsteps: 4321\n```" in section(card, "How it was made")
    code = load_code(local_hub, "org/family")
    assert len(code.splitlines()) == 2 + 1 + 4 + 1
    found = {}
    for line in code.splitlines()[3:]:
        exec("\n".join([*code.splitlines()[:2], line]), found)
        assert f"{format_count(found['model'].num_parameters())} parameters" in line or "without hf_elastic" in line
    assert type(found["model"]) is NemotronHForCausalLM
    quarter = ElasticForCausalLM.from_pretrained(lab / "stock", budget="quarter")
    assert_same_weights(found["model"], quarter)

    # a slice, from the Hub: its family and commit are known
    commit = local_hub.repositories["org/family"].refs["main"]
    assert push("org/family", "org/half", "--budget", "half", "--layout", "stock", "--upload")[0] == 0
    half = ModelCard(files(local_hub, "org/half")["README.md"].decode())
    assert (half.data.base_model, half.data.license) == ("org/family", "mit")
    cut = f"It was cut at `half` from [org/family](https://huggingface.co/org/family), commit `{commit[:12]}`"
    assert cut in half.text
    assert_same_weights(AutoModelForCausalLM.from_pretrained("org/half", budget="quarter"), quarter)
    # a slice of the slice is still of the family; exported, it says so too
    export = tmp_path / "export"
    assert main(["export", "org/half", str(export), "--budget", "third"]) == 0
    assert push(export, "org/third", "--upload")[0] == 0
    third = ModelCard(files(local_hub, "org/third")["README.md"].decode())
    assert third.data.base_model == "org/family"
    assert "it was cut at `third` from [org/family]" in third.text
    exec(load_code(local_hub, "org/third"), found)
    assert type(found["model"]) is NemotronHForCausalLM
    assert_same_weights(found["model"], ElasticForCausalLM.from_pretrained(lab / "stock", budget="third"))
    assert rows(third.text, "parameters")[0]["parameters"] == format_count(found["model"].num_parameters())
    assert "cut_from" not in json.loads((lab / "stock/config.json").read_text())
    assert json.loads((lab / "export/config.json").read_text())["cut_from"] == {"budget": "third"}, "no folder's name"


def test_a_readme_that_somebody_wrote_is_kept(lab, push, local_hub, tmp_path):
    family = ElasticForCausalLM.from_pretrained(lab / "stock", budget="third")
    family.push_to_hub("org/mine", license="mit", base_model=PARENT)
    first = files(local_hub, "org/mine")["README.md"].decode()
    family.push_to_hub("org/mine", layout="stock")  # written anew, what is known stays
    second = files(local_hub, "org/mine")["README.md"].decode()
    assert "budgets/quarter" in first
    assert "budgets/quarter" not in second
    assert ModelCard(second).data.license == "mit"
    assert ModelCard(second).data.base_model == PARENT
    mine = second.replace(MARKER, "My own words.")
    main_files = files(local_hub, "org/mine")
    local_hub.repositories["org/mine"].add({**main_files, "README.md": mine.encode()})
    family.push_to_hub("org/mine")
    assert files(local_hub, "org/mine")["README.md"].decode() == mine
    family.push_to_hub("org/mine", tags=["more"])
    kept = ModelCard(files(local_hub, "org/mine")["README.md"].decode())
    assert "My own words." in kept.text
    assert kept.data.tags[-1] == "more"
    before = local_hub.repositories["org/mine"].refs["main"]
    with pytest.raises(
        ElasticConfigError, match="README.md of org/mine was written by somebody.*license would have no"
    ):
        family.push_to_hub("org/mine", license="apache-2.0")
    assert local_hub.repositories["org/mine"].refs["main"] == before
    family.push_to_hub("org/mine", license="apache-2.0", overwrite_readme=True)
    assert MARKER in files(local_hub, "org/mine")["README.md"].decode()
    # a new branch begins with what main has, and so with its README
    refs = local_hub.repositories["org/mine"].refs
    local_hub.repositories["org/mine"].add({**files(local_hub, "org/mine"), "README.md": mine.encode()})
    before = refs["main"]
    for _ in range(2):
        family.push_to_hub("org/mine", revision="v2", layout="stock")
        assert refs["main"] == before
        branch = local_hub.repositories["org/mine"].commits[refs["v2"]]
        assert branch["README.md"].decode() == mine
        assert "model.safetensors" in branch
        assert not [name for name in branch if name.startswith("budgets/")]
    # the same for one in the folder, which comes along; a generated one there does not replace one that somebody wrote on the Hub
    family.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/README.md").write_text("# Mine\n")
    upload = prepare_upload(tmp_path / "folder", "org/other")
    assert upload.card is None
    status, shown = push(tmp_path / "folder", "org/other", "--layout", "stock", "--upload")
    assert (status, "the README.md of folder is kept" in shown) == (0, True)
    assert files(local_hub, "org/other")["README.md"] == b"# Mine\n"
    family.save_pretrained(tmp_path / "made")
    (tmp_path / "made/README.md").write_text(str(render_card(family)))
    assert README not in prepare_upload(tmp_path / "made", "org/other").files
    assert README not in prepare_upload(tmp_path / "made", "org/other", revision="not-made-yet").files
    upload = prepare_upload(tmp_path / "folder", "org/other", CardArguments(license="mit", overwrite_readme=True))
    assert MARKER in str(upload.card)
    assert (tmp_path / "folder/README.md").read_text() == "# Mine\n"


def test_what_is_not_pushed(lab, push, local_hub, tmp_path, monkeypatch):
    def refuse(message, *arguments):
        status, shown = push(*arguments, "--upload")
        assert status == 2
        assert re.search(message, shown), shown
        assert not local_hub.repositories

    refuse("is a plain nemotron_h checkpoint: neither elastic nor an export", PARENT_DIR, "org/new")
    for fields, said in (("{}", "has no model_type"), ('{"model_type": 3}', "says model_type=3, which is no name")):
        (tmp_path / "unnamed").mkdir(exist_ok=True)
        (tmp_path / "unnamed" / "config.json").write_text(fields)
        refuse(f"unnamed is no checkpoint that can be published: its config.json {said}", tmp_path / "unnamed", "o/n")
    refuse("can be no repository", lab / "nested", "org/new/er")
    refuse(
        "--layout nested: .*export is a plain checkpoint of one size", lab / "export", "org/new", "--layout", "nested"
    )
    refuse("unknown budget 'hafl'.*Did you mean 'half'", lab / "nested", "org/new", "--budget", "hafl")
    refuse("is a file", MEASURED, "org/new")
    (tmp_path / "readme").mkdir()
    for file in (lab / "export").iterdir():
        (tmp_path / "readme" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "readme/README.md").write_text("---\na: [\n---\n")
    refuse("the metadata of the README.md of readme cannot be read", tmp_path / "readme", "org/new")
    broken = tmp_path / "broken"
    for name in ("config.json", "budgets/quarter/model.safetensors"):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes((lab / "nested" / name).read_bytes())
    refuse("budgets/third/added.safetensors is missing, though config.json lists it", broken, "org/new")
    family = ElasticForCausalLM.from_pretrained(lab / "stock", budget="quarter")
    with pytest.raises(TypeError, match="'licence'. Did you mean 'license'"):
        family.push_to_hub("org/new", licence="mit")
    with pytest.raises(ElasticConfigError, match="cannot be read as a results file"):
        family.push_to_hub("org/new", results=["nothing.json"])
    assert not local_hub.repositories
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    refuse("there is no token to upload with", lab / "nested", "org/new")
