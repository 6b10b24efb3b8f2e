"""Publish a family, a slice or an export on the Hub, with a model card. Shows what would be uploaded; --upload does it.

SOURCE is an elastic checkpoint, or the folder of a plain one that `hf-elastic export` wrote. A folder in the layout asked for is uploaded
as it is, anything else is written into a temporary folder first; with --budget only the tokenizer comes along. Pickles, hidden files and
checkpoints of a run stay where they are.

  hf-elastic push family me/family --base-model org/model --license apache-2.0
  hf-elastic push family me/family-half --budget half
  hf-elastic push half me/half                             # the folder of an export
  hf-elastic push family me/family --upload
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import ElasticConfigError
from .common import BUDGET_HELP, check_source, table

if TYPE_CHECKING:
    from ..hub.publishing import CardArguments, Upload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub repository")
    parser.add_argument("repo_id", metavar="REPO_ID", help="where to, such as me/nano-elastic")
    parser.add_argument("--budget", help=BUDGET_HELP)
    parser.add_argument(
        "--layout",
        choices=("nested", "stock"),
        help="files per size, of which a size downloads only its own, or files as the stock model writes them (default: nested; stock for an export)",
    )
    parser.add_argument("--upload", "--yes", action="store_true", help="upload; without, nothing is sent")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make the repository private, if it is made"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; it is made if it does not exist (default: main)"
    )
    parser.add_argument("--message", help="of the commit (default: Upload model)")
    parser.add_argument("--base-model", metavar="REPO", help="what it was made from, for the card")
    parser.add_argument(
        "--license", help="the Hub's identifier, such as apache-2.0 (default: that of the base model's card)"
    )
    parser.add_argument("--license-name", help="with --license other")
    parser.add_argument("--license-link", help="with --license other")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="FILE[::PATTERN]",
        help="results for the card, which are uploaded, too: plans.json of evaluate, or a benchmark's, of which PATTERN chooses measurements; repeat it",
    )
    parser.add_argument("--recipe", metavar="FILE", help="text that says how it was made; the card quotes it")
    parser.add_argument("--overwrite-readme", action="store_true", help="replace a README.md that somebody wrote, too")


def run(args: argparse.Namespace) -> None:
    from huggingface_hub import get_token

    from ..hub.publishing import CardArguments, full_repo_id, prepare_upload

    if args.upload and get_token() is None:
        raise ElasticConfigError("there is no token to upload with: `hf auth login`, or set HF_TOKEN.")
    repo_id = full_repo_id(args.repo_id)
    card = CardArguments(
        base_model=args.base_model,
        license=args.license,
        license_name=args.license_name,
        license_link=args.license_link,
        results=args.results,
        recipe=args.recipe,
        overwrite_readme=args.overwrite_readme,
    )
    with _checkpoint(args, repo_id, card) as folder:
        upload = prepare_upload(folder, repo_id, card, revision=args.revision, offline=not args.upload)
        print(describe(upload))
        if not args.upload:
            print("\nnothing was uploaded; --upload does it")
            return
        commit = upload.send(private=args.private, revision=args.revision, commit_message=args.message)
        print(f"\nuploaded: {commit.commit_url}")


@contextmanager
def _checkpoint(args: argparse.Namespace, repo_id: str, card: CardArguments) -> Iterator[Path]:
    """The folder to upload: the source itself if it is as it has to be, otherwise a temporary one."""
    from ..configuration.parent import refuse_adapter
    from ..configuration_elastic import ElasticConfig, read_config
    from ..hub.publishing import copy_others, read_published
    from ..modeling_elastic import ElasticForCausalLM
    from ..storage.checksums import has_checksums
    from ..storage.exchanging import refuse_interrupted
    from ..storage.tokenizer_files import optional_tokenizer

    check_source(args.source)
    source = Path(args.source)
    refuse_interrupted(source)
    refuse_adapter(source)
    fields, _ = ElasticConfig.get_config_dict(args.source)
    if fields.get("model_type") != ElasticConfig.model_type:
        if not source.is_dir():
            raise ElasticConfigError(f"{args.source} is no elastic checkpoint; an export is pushed from its folder.")
        read_published(source)  # says so if it is no export
        if args.budget is not None or args.layout == "nested":
            given = "--layout nested" if args.budget is None else f"--budget {args.budget}"
            raise ElasticConfigError(
                f"{given}: {source} is a plain checkpoint of one size; push the elastic one it was cut from."
            )
        yield source
        return
    elastic = read_config(args.source)
    layout = args.layout or "nested"
    if args.budget is not None:
        elastic.resolve(args.budget)  # before anything is loaded
    if source.is_dir() and args.budget is None and layout == ("nested" if "files" in elastic.elastic else "stock"):
        yield source
        return
    with TemporaryDirectory(prefix="hf-elastic-push-") as folder:
        target = Path(folder, source.resolve().name)
        tokenizer = optional_tokenizer(args.source)
        model = ElasticForCausalLM.from_pretrained(args.source, budget=args.budget, verify=has_checksums(args.source))
        model.save_pretrained(target, layout=layout)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if (
            args.budget is None and source.is_dir()
        ):  # what else lies there may say something of the family, not of a slice
            copy_others(source, target)
        yield target


def describe(upload: Upload) -> str:
    """What would be uploaded: files, what every size downloads, which programs do not run which of them, and the card's metadata."""
    from ..architectures.portability import portability, words
    from ..configuration_elastic import ElasticConfig
    from ..hub.card_sections import download_words
    from ..quantization.layouts import coded_in, with_said
    from .plan import obstacle_notes, plan

    sizes = upload.sizes
    rows = [["file", "bytes"], *([name, f"{size:,}"] for name, size in sorted(sizes.items()))]
    rows.append([f"{len(sizes)} files for {upload.repo_id}", f"{sum(sizes.values()):,}"])
    parts = [table(rows, right=frozenset({1}))]
    if upload.left_out:
        parts.append(f"left out: {', '.join(upload.left_out)}")
    if isinstance(upload.config, ElasticConfig):
        names = upload.config.family()
        downloads = [[name, download_words(upload.config, name)] for name in names]
        parts.append(table([["size", "download"], *downloads], right=frozenset({1})))
        parts += obstacle_notes(plan(upload.config))
    else:
        whole = with_said(ElasticConfig.from_parent(upload.config, {}), upload.config)
        (member,), coded = whole.family().values(), coded_in(whole.encodings)
        if obstacles := portability(whole.architecture, upload.config, member, coded=coded):
            parts.append(f"not for every program: {words(obstacles)}")
    parts.append(upload.readme if upload.card is None else f"{upload.readme}:\n{upload.card.data.to_yaml()}")
    return "\n\n".join(parts)
