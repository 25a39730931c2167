"""`nnunet_diffusion report`: one page that shows what was trained, on what, and how well it does."""

import argparse
import os
import sys

from nnunet_diffusion.errors import UserError

HELP = "Write one HTML page of a data set: annotations, trainings, scores, cases to look at, samples."
NEEDS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("-d", metavar="ID", required=True, help="data set id or name")
    parser.add_argument("-o", dest="output", metavar="FILE", help="[report.html in the data set's results]")
    parser.add_argument(
        "--evaluation", nargs="+", default=[], metavar="FILE", help="evaluation_RULES.json of other predictions"
    )
    parser.epilog = (
        "The page is one file, loads nothing from anywhere and opens from disk. It shows what is there at the time;\n"
        "what cannot be read is named on top of it and here, and the exit code is then 1. It holds pictures of scans:\n"
        "treat it as you treat these.\n\n"
        "example:\n"
        "  nnunet_diffusion evaluate MODEL/fold_0/validation PREPROCESSED/gt_segmentations -d 22 --chill\n"
        "  nnunet_diffusion report -d 22"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns 1 if something could not be read."""
    from nnunet_diffusion.files import atomic
    from nnunet_diffusion.preprocessing.planning import find_dataset
    from nnunet_diffusion.report.collect import collect
    from nnunet_diffusion.report.report import build_report
    from nnunet_diffusion.report.rounds import find_rounds
    from nnunet_diffusion.trainers import chosen_settings_of

    name = find_dataset(args.d)
    raw, preprocessed, folder = (os.path.join(os.environ[root], name) for root in NEEDS)
    results = collect(name, raw, preprocessed, folder, args.evaluation, chosen_settings_of)
    if not results.dataset_json:
        raise UserError("\n".join([f"{raw}: its dataset.json cannot be used", *results.problems]))
    cases, pool = files_of(results, name, raw)
    rounds = find_rounds(results, folder, preprocessed)
    text = build_report(results, cases, pool, raw, os.path.join(preprocessed, "gt_segmentations"), rounds)
    path = args.output or os.path.join(folder, "report.html")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    # Names of files need not be UTF-8, nor must text of JSON files.
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text)
    for problem in results.problems:
        print(f"WARNING: {problem}", file=sys.stderr)
    print(f"Wrote {path}: {len(text) / 1e6:.1f} MB")
    return int(bool(results.problems))


def files_of(results, name: str, raw: str) -> tuple[dict, list[str]]:
    """Returns files of the labeled cases and names of the unlabeled ones; what is wrong with them is a problem."""
    from nnunet_diffusion.preprocessing.cases import labeled_cases, unlabeled_cases

    cases = results.attempt(raw, lambda raw: labeled_cases(name)[1]) or {}
    return cases, list(results.attempt(raw, lambda raw: unlabeled_cases(raw, results.dataset_json)) or {})
