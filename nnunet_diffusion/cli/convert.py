"""`nnunet_diffusion convert`: raw data sets that refer to the scans where they are."""

import argparse
import importlib
import os
import re
from pathlib import Path
from typing import Any

from nnunet_diffusion import dataset_conversion
from nnunet_diffusion.conversion.command_line import add_arguments as add_common_arguments
from nnunet_diffusion.conversion.command_line import tell
from nnunet_diffusion.errors import UserError

HELP = "Make an nnU-Net data set of labeled and unlabeled scans: published sets, folders of your own, several joined."
# {kits: Dataset040_KiTS.py}: the file is called after the default id and name, its docstring is the help
SCRIPTS = {path.stem.split("_")[1].lower(): path for path in Path(dataset_conversion.__path__[0]).glob("Dataset*_*.py")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the ways to convert."""
    layouts = parser.add_subparsers(dest="layout", required=True, metavar="WAY")
    examples = [_add_published(layouts, name, SCRIPTS[name]) for name in sorted(SCRIPTS)]
    _add_folder(layouts)
    _add_partial(layouts)
    parser.epilog = (
        "examples:\n"
        "  nnunet_diffusion convert folder ct labels --unlabeled more_ct -d 501 -n Neck --labels Brainstem Mandible\n"
        "  nnunet_diffusion convert partial abdomen -d 600 -n Abdomen --only FLARE22 KiTS BTCV\n"
        + "".join(examples)
        + "`nnunet_diffusion convert WAY --help` tells more."
    )


def _add_published(layouts: Any, name: str, script: Path) -> str:
    """Adds a published data set; returns an example."""
    description = script.read_text(encoding="utf-8").split('"""')[1]  # importing it takes a second
    title, default_id = script.stem.partition("_")[2], int(script.stem[len("Dataset") :][:3])
    parser = _add_way(layouts, name, description)
    add_common_arguments(parser, default_id, title)
    if name == "kits":
        parser.add_argument("--year", type=int, choices=(19, 21, 23), help="where the files do not tell")
    example = f"  nnunet_diffusion convert {name} ~/{title} -d {default_id}\n"
    parser.epilog = f"example:\n{example}"
    return example


def _add_folder(layouts: Any) -> None:
    folder = _add_way(layouts, "folder", "Your own data: a folder of images, one of labels, any number of unlabeled.")
    add_common_arguments(folder)
    folder.add_argument("images", metavar="IMAGES", help="CASE.nii.gz, or CASE_0000.nii.gz, CASE_0001.nii.gz, ...")
    folder.add_argument("label_folder", metavar="LABELS", help="CASE.nii.gz for every case of IMAGES")
    folder.add_argument("--unlabeled", nargs="+", default=[], metavar="FOLDER", help="more images, without labels")
    folder.add_argument(
        "--labels", nargs="+", required=True, metavar="NAME", help="names of the labels 1, 2, ..., or one JSON file"
    )
    folder.add_argument(
        "--channel_names", nargs="+", default=["CT"], metavar="NAME", help="of every channel (default: CT)"
    )
    folder.add_argument(
        "--annotated", metavar="FILE", help='JSON of what was annotated: {"CASE": ["NAME", ...]}; others: everything'
    )
    folder.add_argument("--file_ending", help="such as .nii.gz; only needed if the folders hold several types")
    folder.epilog = (
        'A JSON file of labels holds {"liver": 1, "left kidney": 2}, or "labels" and "regions_class_order" as in\n'
        "nnU-Net's dataset.json. nnU-Net normalizes a channel by its name: CT by intensities of the whole data set,\n"
        "noNorm not at all, rgb_to_0_1 by 255, any other name by those of the scan.\n\n"
        "--annotated names the labels that somebody looked for in a case: where its label file has none of them, the\n"
        "scan has none. Of its other labels nothing is known: PartialLabelTrainer does not call them background.\n\n"
        "example:\n"
        "  nnunet_diffusion convert folder ct labels --unlabeled more_ct -d 501 -n Neck --labels Brainstem Mandible"
    )


PARTIAL_HELP = """\
MAPPING.json:
  {"labels": ["liver", "liver tumor", "left kidney", "right kidney"],       the common table, values 1, 2, ...
   "sources": [
     {"name": "LiTS",                                   prefix of its cases: LiTS_0
      "dataset": "Dataset029_LiTS",                     in nnUNet_raw, or the folder of a raw data set
      "mapping": {"liver": "liver", "tumor": "liver tumor"},
      "inside": {"tumor": "liver"}},
     {"name": "KiTS",
      "images": "kits/images", "labels": "kits/labels", folders instead, below MAPPING.json's if relative;
      "label_names": {"kidney": 1, "tumor": 2},         with channels, "channel_names": ["CT"] unless it says so
      "mapping": {"kidney": ["left kidney", "right kidney"], "tumor": ["left kidney", "right kidney"]},
      "unlabeled": ["kits/more"]},                      folders of images without labels, for any source
     {"name": "FLARE22", "dataset": "Dataset022_FLARE22",
      "mapping": {"liver": ["liver", "liver tumor"], "left kidney": "left kidney", "right kidney": "right kidney"}}]}

mapping   "name" is that common label; several labels may become one ("liver": "liver", "tumor": "liver").
          A list is a union: each of these voxels is one of them, nobody said which. It constrains their sum only, no
          side is guessed. In a source a label is annotated or in one union, never both.
          null, or no mention, leaves a label out: background. Without "mapping", labels of the same name are taken.
          "ignore" may be the last common label; voxels that become it are not learned from.
inside    {"tumor": "liver"}: in this source tumors are holes in the liver. A label that is left out then becomes what
          it lies in. One with a common label of its own asks every other source that annotates the liver without
          tumors what its liver is: with tumors, a union, "liver": ["liver", "liver tumor"]; or without,
excludes  "excludes": ["liver tumor"]: no voxel of this source's labels is that (holes for tumors, or no tumors).
about     your comment, anywhere.

Images stay where they are (--copy copies them), label maps are written anew. dataset.json gets annotated_labels and
union_labels, which PartialLabelTrainer reads. Scans of different orientation, as these sets have, are turned to one by
nnU-Net's reader. Test scans are left where they are, for nnUNetv2_predict.

`abdomen` is a ready mapping of FLARE22, AMOS22, BTCV, KiTS, LiTS and the Decathlon's Pancreas and Spleen onto FLARE22's
13 organs; --only takes those that you have.

example:
  nnunet_diffusion convert partial abdomen -d 600 -n Abdomen --only FLARE22 KiTS BTCV"""


def _add_partial(layouts: Any) -> None:
    partial = _add_way(layouts, "partial", "Several data sets that each annotate some labels, joined into one.")
    add_common_arguments(partial)
    partial.add_argument(
        "mapping", metavar="MAPPING.json", help="what each source's labels are called in the joined set"
    )
    partial.add_argument("--only", nargs="+", default=[], metavar="SOURCE", help="join these sources (default: all)")
    partial.epilog = PARTIAL_HELP


def _add_way(layouts: Any, name: str, description: str) -> argparse.ArgumentParser:
    return layouts.add_parser(
        name,
        help=re.sub(r" \(http.*?\)", "", description.splitlines()[0]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns 1 if unlabeled scans had to be left out."""
    convert = {"folder": _convert_folder, "partial": _convert_partial}.get(args.layout, _convert_published)
    return tell(convert(args))


def _convert_published(args: argparse.Namespace) -> Any:
    script = importlib.import_module(f"nnunet_diffusion.dataset_conversion.{SCRIPTS[args.layout].stem}")
    keys = ("source", "year", "dataset_id", "name", "copy", "num_threads")
    return getattr(script, f"convert_{args.layout}")(**{key: getattr(args, key) for key in keys if hasattr(args, key)})


def _convert_folder(args: argparse.Namespace) -> Any:
    from nnunet_diffusion.conversion.files import convert_folders
    from nnunet_diffusion.conversion.schemas import AnnotatedLabels
    from nnunet_diffusion.files import read_json

    channels = {str(channel): name for channel, name in enumerate(args.channel_names)}
    annotated = {"annotated_labels": read_json(args.annotated, AnnotatedLabels)} if args.annotated else {}
    return convert_folders(
        args.dataset_id,
        args.name,
        args.images,
        args.label_folder,
        args.unlabeled,
        {"channel_names": channels, **read_labels(args.labels), **annotated},
        args.file_ending,
        copy=args.copy,
        num_threads=args.num_threads,
    )


def _convert_partial(args: argparse.Namespace) -> Any:
    from nnunet_diffusion.conversion.partial import convert_partial

    mapping = args.mapping
    if mapping == "abdomen" and not os.path.isfile(mapping):
        mapping = os.path.join(dataset_conversion.__path__[0], "abdomen.json")
    return convert_partial(mapping, args.dataset_id, args.name, args.only, args.copy, args.num_threads)


def read_labels(labels: list[str]) -> dict[str, Any]:
    """Reads `labels`, and `regions_class_order` if there is one, as dataset.json has them: names, or one JSON file.

    Raises:
        UserError: If a name comes twice, or the file is not what it should be.
    """
    if len(labels) == 1 and labels[0].endswith(".json"):
        return _read_label_file(labels[0])
    if len(set(labels)) < len(labels) or "background" in labels:
        raise UserError(f"--labels {labels}: name each label once; the background is always 0 and is not named")
    return {"labels": {"background": 0, **{name: value for value, name in enumerate(labels, start=1)}}}


def _read_label_file(path: str) -> dict[str, Any]:
    from nnunet_diffusion.conversion.dataset import label_values
    from nnunet_diffusion.conversion.schemas import LabelFile
    from nnunet_diffusion.files import check_shape, read_json

    content = read_json(path, dict[str, Any])
    content = content if "labels" in content else {"labels": content}
    check_shape(content, LabelFile, path)
    content["labels"] = {"background": 0, **content["labels"]}
    try:
        label_values(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {key: content[key] for key in ("labels", "regions_class_order") if key in content}
