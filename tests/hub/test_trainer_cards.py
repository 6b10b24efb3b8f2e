"""What trl wrote of a run is no one's words: it gives way to a card, and what it says of the run stays."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from trl.trainer.utils import generate_model_card

from hf_elastic import CheckpointError, ElasticConfigError, ElasticForCausalLM
from hf_elastic.cli import main
from hf_elastic.hub.cards import MARKER
from hf_elastic.hub.publishing import CardArguments, prepare_upload
from hf_elastic.hub.trainer_cards import run_facts


def generated(**fields) -> ModelCard:
    """As trl's trainers write it."""
    defaults = {"base_model": None, "model_name": "out", "hub_model_id": None, "dataset_name": None, "wandb_url": None}
    defaults |= {"trackio_url": None, "trainer_name": "Elastic distillation", "tags": ["trl", "distillation"]}
    return generate_model_card(**{**defaults, **fields})


PAPER = {"paper_title": "Nemotron Elastic: [Many] (in) One", "paper_id": "2511.16664", "trainer_citation": "@a{b,\n}"}
LINKS = {"wandb_url": "https://wandb.ai/me/run", "comet_url": "https://comet.com/me"}


@pytest.mark.parametrize("fields", [{}, PAPER, LINKS, {"trackio_url": "https://me.hf.space"}, {**PAPER, **LINKS}])
@pytest.mark.parametrize("names", [{}, {"base_model": "org/base", "dataset_name": "org/data", "hub_model_id": "a/b"}])
def test_facts_of_the_run(fields, names):
    facts = run_facts(generated(**fields, **names))
    assert facts is not None
    assert "Trained with [TRL]" in facts
    assert "Elastic distillation" in facts
    assert "Versions of the run: TRL " in facts
    for value in [*fields.values(), *([names["dataset_name"]] if names else [])]:
        assert value in facts or value == PAPER["trainer_citation"]
    assert "None" not in facts


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("## Quick start", "It is good at sums.\n\n## Quick start"),
        lambda text: text.replace("## Training procedure", "## Limits\n\nNone.\n\n## Training procedure"),
        lambda text: text.replace("question = ", "# ask it this\nquestion = "),
        lambda text: text.replace("### Framework versions", "On 8 GPUs.\n\n### Framework versions"),
        lambda text: text.replace("- TRL:", "- GPU: H100 of ours\n- TRL:"),
        lambda text: text + "\n\nThanks to all.",
        lambda text: "Read this first.\n" + text,
        lambda text: text.replace("## Citations", "## Citations\n\nCite me."),
    ],
)
def test_what_somebody_changed_is_somebodys(change):
    card = generated(**PAPER, **LINKS)
    assert run_facts(card)
    card.text = change(card.text)
    assert run_facts(card) is None
    assert run_facts(ModelCard("---\ntags: [trl]\n---\n" + generated().text)) is None, "its metadata says so, too"
    assert run_facts(None) is None


@pytest.fixture
def trained(family_folder, tmp_path):
    """A family with the README of a run beside it."""
    folder = tmp_path / "trained"
    shutil.copytree(family_folder("nano3"), folder)
    generated(**PAPER, wandb_url=LINKS["wandb_url"]).save(folder / "README.md")
    return folder


def test_push_writes_the_card_and_keeps_the_facts(trained, local_hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    command = ["push", str(trained), "org/mine", "--layout", "stock", "--base-model", "org/base", "--license", "mit"]
    assert main(command) == 0
    assert "README.md is new, with what trl's of trained says of the run" in capsys.readouterr().out
    upload = prepare_upload(trained, "org/mine", CardArguments(base_model="org/base", license="mit"))
    assert MARKER in upload.card.text
    assert "fine-tuned version of" not in upload.card.text
    assert "None" not in upload.card.text
    made = upload.card.text.partition("## How it was made")[2]
    assert "https://wandb.ai/me/run" in made
    assert "Versions of the run: TRL" in made
    assert (upload.card.data.license, upload.card.data.base_model) == ("mit", "org/base")
    assert {"elastic", "trl", "generated_from_trainer"} <= set(upload.card.data.tags)
    # one on the Hub, where a trainer pushed it, gives way as well
    family = ElasticForCausalLM.from_pretrained(trained)
    family.push_to_hub("org/mine", layout="stock", license="mit", base_model="org/base")
    repository = local_hub.repositories["org/mine"]
    text = (trained / "README.md").read_bytes()
    repository.add({**repository.commits[repository.refs["main"]], "README.md": text})
    family.push_to_hub("org/mine", layout="stock", license="apache-2.0")
    pushed = ModelCard(repository.commits[repository.refs["main"]]["README.md"].decode())
    assert pushed.data.license == "apache-2.0"
    assert "https://wandb.ai/me/run" in pushed.text


def test_the_card_says_what_the_run_said_of_its_sizes(trained, local_hub):
    before = prepare_upload(trained, "org/mine").card.text
    assert "What the run said" not in before
    budgets = [{"budget": "full", "sentence": "full is near: done."}, {"budget": "gone", "sentence": "gone is far."}]
    (trained / "training_verdict.json").write_text(json.dumps({"steps": 70, "budgets": budgets}), encoding="utf-8")
    card = prepare_upload(trained, "org/mine").card.text
    assert "- What the run said at its end, after 70 steps:\n  - full is near: done.\n" in card
    assert "gone" not in card, "the family has no such size"
    (trained / "training_verdict.json").write_text("[", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"training_verdict\.json"):
        prepare_upload(trained, "org/mine")


def test_what_the_run_says_of_base_and_data_is_taken(trained, local_hub):
    generated(base_model="org/base", dataset_name="org/data").save(trained / "README.md")
    card = prepare_upload(trained, "org/mine").card
    assert (card.data.base_model, card.data.datasets) == ("org/base", "org/data")
    assert (
        prepare_upload(trained, "org/mine", CardArguments(base_model="org/other")).card.data.base_model == "org/other"
    )


ADDED = {"license": "cc-by-nc-4.0", "language": "de", "extra_gated_prompt": "Ask us.", "new_version": "org/newer"}


@pytest.mark.parametrize("where", ["folder", "hub", "both"])
def test_metadata_that_somebody_added_stays(where, trained, local_hub, tmp_path, monkeypatch):
    """Also where the base model has another license, and in the push after this one, when trl's README is gone."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n")
    local_hub.commit("org/base", base)
    readme = trained / "README.md"
    card = generated(base_model="org/base")
    for key, value in ADDED.items():
        card.data[key] = value
    local_hub.commit("org/mine", base)
    repository = local_hub.repositories["org/mine"]

    def on_the_hub(text):
        repository.add({**repository.commits[repository.refs["main"]], "README.md": str(text).encode()})

    on_the_hub(card if where != "folder" else generated())
    if where == "hub":
        readme.unlink()
    else:
        readme.write_text(str(card if where == "folder" else generated(base_model="org/base")))
    first = prepare_upload(trained, "org/mine").card
    readme.unlink(missing_ok=True)
    on_the_hub(first)
    for said in (first, prepare_upload(trained, "org/mine").card):
        assert MARKER in said.text
        assert ADDED.items() <= said.data.to_dict().items()
        assert (said.data.base_model, said.data.license_link, said.data.get("licence")) == ("org/base", None, None)
    given = prepare_upload(trained, "org/mine", CardArguments(license="mit")).card.data
    assert (given.license, given.language) == ("mit", "de")


def test_a_license_in_the_spelling_of_trl_is_one(trained, local_hub):
    readme = trained / "README.md"
    readme.write_text(readme.read_text().replace("licence: license", "licence: cc-by-4.0\npipeline_tag: other"))
    data = prepare_upload(trained, "org/mine").card.data
    assert (data.license, data.pipeline_tag) == ("cc-by-4.0", "other")
    assert "licence" not in data


def test_one_that_a_person_went_on_writing_is_kept(trained, local_hub):
    words = (trained / "README.md").read_text().replace("## Quick start", "It is good at sums.\n\n## Quick start")
    (trained / "README.md").write_text(words)
    assert prepare_upload(trained, "org/mine").card is None
    with pytest.raises(ElasticConfigError, match="written by somebody and is kept, so license would have no effect"):
        prepare_upload(trained, "org/mine", CardArguments(license="mit"))
