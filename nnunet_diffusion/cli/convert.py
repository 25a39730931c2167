"""`nnunet_diffusion convert`: raw data sets that refer to the scans where they are."""

import argparse
import json
import os
import sys
from typing import Any

from nnunet_diffusion.errors import UserError

HELP = "Make an nnU-Net data set of labelled and unlabelled scans: FLARE22, folders of your own, or several data sets."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the ways to convert."""
    parser.epilog = (
        "examples:\n"
        "  nnunet_diffusion convert flare22 ~/FLARE22 -d 22\n"
        "  nnunet_diffusion convert folder ct labels --unlabeled more_ct -d 501 -n Neck --labels Brainstem Mandible\n"
        "  nnunet_diffusion convert partial abdomen -d 600 -n Abdomen --only FLARE22 KiTS BTCV\n"
        "`nnunet_diffusion convert flare22 --help`, `... folder --help` and `... partial --help` tell more.\n"
        "Other public sets have a script each, python -m nnunet_diffusion.dataset_conversion.Dataset040_KiTS --help:\n"
        "Dataset003_Liver, Dataset007_Pancreas, Dataset009_Spleen (Medical Segmentation Decathlon), Dataset017_BTCV,\n"
        "Dataset029_LiTS, Dataset040_KiTS, Dataset218_AMOS22."
    )
    layouts = parser.add_subparsers(dest="layout", required=True, metavar="flare22|folder|partial")
    _add_flare22(layouts)
    _add_folder(layouts)
    _add_partial(layouts)


def _add_flare22(layouts: Any) -> None:
    flare22 = _add_layout(layouts, "flare22", "FLARE22 as published, or any part of it: abdominal CT with 13 organs.")
    flare22.add_argument("source", metavar="SOURCE", help="the folder that FLARE22 was unpacked into")
    flare22.add_argument("-d", dest="dataset_id", type=int, default=22, metavar="ID", help="data set id (default: 22)")
    flare22.add_argument("-n", dest="name", default="FLARE22", metavar="NAME", help="its name (default: FLARE22)")
    flare22.epilog = (
        "Files are recognised by their names, in whichever folder below SOURCE they are: FLARE22_Tr_0001_0000.nii.gz\n"
        "is an image, FLARE22_Tr_0001.nii.gz its label, Case_00001_0000.nii.gz an unlabelled scan. Evaluation scans\n"
        "(FLARETs_..., FLARE22_Ts_...) stay where they are, for nnUNetv2_predict, and are not trained on; only where\n"
        "there is no training case at all are those of them that have labels taken instead.\n\n"
        "example:\n  nnunet_diffusion convert flare22 ~/FLARE22 -d 22"
    )


def _add_folder(layouts: Any) -> None:
    folder = _add_layout(
        layouts, "folder", "Your own data: a folder of images, one of labels, any number of unlabelled."
    )
    folder.add_argument("images", metavar="IMAGES", help="CASE.nii.gz, or CASE_0000.nii.gz, CASE_0001.nii.gz, ...")
    folder.add_argument("label_folder", metavar="LABELS", help="CASE.nii.gz for every case of IMAGES")
    folder.add_argument("--unlabeled", nargs="+", default=[], metavar="FOLDER", help="more images, without labels")
    folder.add_argument("-d", dest="dataset_id", type=int, required=True, metavar="ID", help="data set id, 1 to 999")
    folder.add_argument("-n", dest="name", required=True, metavar="NAME", help="name of the data set")
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
        "nnU-Net's dataset.json. nnU-Net normalises a channel by its name: CT by intensities of the whole data set,\n"
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
inside    {"tumor": "liver"}: in this source tumours are holes in the liver. A label that is left out then becomes what
          it lies in. One with a common label of its own asks every other source that annotates the liver without
          tumours what its liver is: with tumours, a union, "liver": ["liver", "liver tumor"]; or without,
excludes  "excludes": ["liver tumor"]: no voxel of this source's labels is that (holes for tumours, or no tumours).
about     your comment, anywhere.

Images stay where they are (--copy copies them), label maps are written anew. dataset.json gets annotated_labels and
union_labels, which PartialLabelTrainer reads. Scans of different orientation, as these sets have, are turned to one by
nnU-Net's reader. Test scans are left where they are, for nnUNetv2_predict.

`abdomen` is a ready mapping of FLARE22, AMOS22, BTCV, KiTS, LiTS and the Decathlon's Pancreas and Spleen onto FLARE22's
13 organs; --only takes those that you have.

example:
  nnunet_diffusion convert partial abdomen -d 600 -n Abdomen --only FLARE22 KiTS BTCV"""


def _add_partial(layouts: Any) -> None:
    partial = _add_layout(layouts, "partial", "Several data sets that each annotate some labels, joined into one.")
    partial.add_argument(
        "mapping", metavar="MAPPING.json", help="what each source's labels are called in the joined set"
    )
    partial.add_argument("-d", dest="dataset_id", type=int, required=True, metavar="ID", help="data set id, 1 to 999")
    partial.add_argument("-n", dest="name", required=True, metavar="NAME", help="name of the data set")
    partial.add_argument("--only", nargs="+", default=[], metavar="SOURCE", help="join these sources (default: all)")
    partial.epilog = PARTIAL_HELP


def _add_layout(layouts: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser = layouts.add_parser(
        name, help=description, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copy", action="store_true", help="copy the files in, instead of referring to where they are")
    parser.add_argument(
        "-np", dest="num_threads", type=int, default=4, metavar="N", help="checks at a time (default: 4)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Converts; returns 1 if unlabelled scans had to be left out."""
    ways = {"flare22": _convert_flare22, "folder": _convert_folder, "partial": _convert_partial}
    converted = ways[args.layout](args)
    print(converted, file=sys.stderr if converted.skipped else sys.stdout)
    for warning in converted.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return int(bool(converted.skipped))


def _convert_flare22(args: argparse.Namespace) -> Any:
    from nnunet_diffusion.dataset_conversion.Dataset022_FLARE22 import convert_flare22

    return convert_flare22(args.source, args.dataset_id, args.name, args.copy, args.num_threads)


def _convert_folder(args: argparse.Namespace) -> Any:
    from nnunet_diffusion.conversion.files import convert_folders

    channels = {str(channel): name for channel, name in enumerate(args.channel_names)}
    annotated = {"annotated_labels": read_object(args.annotated)} if args.annotated else {}
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
    from nnunet_diffusion import dataset_conversion
    from nnunet_diffusion.conversion.partial import convert_partial

    mapping = args.mapping
    if mapping == "abdomen" and not os.path.isfile(mapping):
        mapping = os.path.join(os.path.dirname(dataset_conversion.__file__), "abdomen.json")
    return convert_partial(mapping, args.dataset_id, args.name, args.only, args.copy, args.num_threads)


def read_labels(labels: list[str]) -> dict[str, Any]:
    """`labels`, and `regions_class_order` if there is one, as dataset.json has them, from names or one JSON file.

    Raises:
        UserError: If a name comes twice, or the file is not what it should be.
    """
    if len(labels) == 1 and labels[0].endswith(".json"):
        return _read_label_file(labels[0])
    if len(set(labels)) < len(labels) or "background" in labels:
        raise UserError(f"--labels {labels}: name each label once; the background is always 0 and is not named")
    return {"labels": {"background": 0, **{name: value for value, name in enumerate(labels, start=1)}}}


def read_object(path: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        UserError: If it is no JSON, or no object.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}): correct it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold an object, {{...}}, not {str(content)[:80]}")
    return content


def _read_label_file(path: str) -> dict[str, Any]:
    content = read_object(path)
    labels = content.get("labels", content)
    if not isinstance(labels, dict):
        raise UserError(f'{path}: must hold an object such as {{"liver": 1}}, not {str(content)[:80]}')
    order = {"regions_class_order": content["regions_class_order"]} if "regions_class_order" in content else {}
    return {"labels": {"background": 0, **labels}, **order}
