"""`nnunet_diffusion export`: makes a trained model usable without this package, a denoiser usable by others."""

import argparse

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import naming_full_disk

HELP = (
    "Copy a trained model so that plain nnU-Net predicts with it, with nothing of this package installed; or write a "
    "denoiser's folder for others: denoiser, plan, fingerprint, model card."
)
NEEDS = ("nnUNet_results",)
PRETRAINER = "DenoisingDiffusionTrainer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stock", action="store_true", help="export as a model of nnUNetTrainer, proven on one patch")
    what.add_argument("--denoiser", metavar="FOLDER", help="folder to create for a denoiser, that others plan like")
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set id or name")
    parser.add_argument("-tr", metavar="TRAINER", help=f"trainer of the model [of a denoiser: {PRETRAINER}]")
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
        "  nnunet_diffusion export --denoiser flare22_denoiser -d 22 -c 3d_fullres -p nnUNetDiffusionPlans\n"
        "  nnunet_diffusion export --stock -d 22 -c 3d_fullres -tr DiffusionPretrainedTrainer -p nnUNetDiffusionPlans\n"
        "  nnUNetv2_predict -d 22 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans -i IMAGES -o SEGMENTATIONS"
    )


def run(args: argparse.Namespace) -> int:
    """Exports the model, or the denoiser, and says where it is."""
    return run_denoiser(args) if args.denoiser else run_stock(args)


def run_denoiser(args: argparse.Namespace) -> int:
    """Exports a denoiser, and says what its owner has to write."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunet_diffusion.preprocessing.planning import dataset_name
    from nnunet_diffusion.pretraining.exported import CARD, export_denoiser

    if args.o or args.member is not None or len(args.f or []) > 1:
        raise UserError("--denoiser FOLDER is exported there, of one fold: leave out -o and --member, give one -f")
    source = get_output_folder(dataset_name(args.d), args.tr or PRETRAINER, args.p, args.c)
    with naming_full_disk(args.denoiser):
        fold = export_denoiser(source, args.f[0] if args.f else None, args.denoiser)
    print(f"{args.denoiser}: denoiser of fold {fold}, plan, fingerprint and model card; state the license in {CARD}")
    return 0


def run_stock(args: argparse.Namespace) -> int:
    """Exports a model as nnU-Net's own."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunet_diffusion.export import export_stock
    from nnunet_diffusion.preprocessing.planning import dataset_name

    if not args.tr:
        raise UserError("--stock: give the trainer of the model with -tr")
    dataset = dataset_name(args.d)
    source = get_output_folder(dataset, args.tr, args.p, args.c)
    destination = args.o or get_output_folder(dataset, "nnUNetTrainer", args.p, args.c)
    with naming_full_disk(destination):
        folds = export_stock(source, destination, args.f, args.chk, args.member)
    what = "" if args.member is None else f"member {args.member}, "
    print(f"{destination}: {what}fold {', '.join(folds)}; plain nnU-Net predicts the same, bit by bit")
    return 0
