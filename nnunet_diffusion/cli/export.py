"""`nnunet_diffusion export`: makes a trained model usable without this package."""

import argparse

from nnunet_diffusion.files import naming_full_disk

HELP = "Copy a trained model so that plain nnU-Net predicts with it, with nothing of this package installed."
NEEDS = ("nnUNet_results",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--stock", action="store_true", required=True, help="export as a model of nnUNetTrainer, proven on one patch"
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set id or name")
    parser.add_argument("-tr", metavar="TRAINER", required=True, help="trainer of the model")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans of the model [%(default)s]")
    parser.add_argument("-c", metavar="CONFIGURATION", required=True, help="configuration of the model")
    parser.add_argument("-f", metavar="FOLD", nargs="+", help="folds to export [all that have the checkpoint]")
    parser.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint of each fold [%(default)s]"
    )
    parser.add_argument("--member", type=int, metavar="K", help="of a model of several networks, the one to export")
    parser.add_argument(
        "-o", metavar="FOLDER", help="model folder to create [nnUNetTrainer__PLANS__CONFIGURATION beside the model]"
    )
    parser.epilog = (
        "example:\n"
        "  nnunet_diffusion export --stock -d 22 -c 3d_fullres -tr DiffusionPretrainedTrainer -p nnUNetDiffusionPlans\n"
        "  nnUNetv2_predict -d 22 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans -i IMAGES -o SEGMENTATIONS"
    )


def run(args: argparse.Namespace) -> int:
    """Exports the model and says where it is."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunet_diffusion.export import export_stock
    from nnunet_diffusion.preprocessing.planning import dataset_name

    dataset = dataset_name(args.d)
    source = get_output_folder(dataset, args.tr, args.p, args.c)
    destination = args.o or get_output_folder(dataset, "nnUNetTrainer", args.p, args.c)
    with naming_full_disk(destination):
        folds = export_stock(source, destination, args.f, args.chk, args.member)
    what = "" if args.member is None else f"member {args.member}, "
    print(f"{destination}: {what}fold {', '.join(folds)}; plain nnU-Net predicts the same, bit by bit")
    return 0
