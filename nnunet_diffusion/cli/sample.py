"""`nnunet_diffusion sample`: images from a denoiser, to look at and to measure."""

import argparse
import glob
import os
from pathlib import Path

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import require_folders, usable_device

HELP = "Draw images from a denoiser, in Hounsfield units for CT: NIfTI files and a sheet to look at."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("-d", metavar="ID", help="data set id or name: draw from its denoiser")
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration of the denoiser")
    parser.add_argument("-p", metavar="PLANS", help="plans of the denoiser [the only ones with one, or nnUNetPlans]")
    parser.add_argument("-f", metavar="FOLD", default="all", help="fold of the denoiser [%(default)s]")
    parser.add_argument("-tr", metavar="TRAINER", default="DenoisingDiffusionTrainer", help="[%(default)s]")
    parser.add_argument("--denoiser", metavar="FILE", help="this denoiser.pth instead of -d and -c")
    parser.add_argument("-n", dest="number", type=int, default=8, metavar="N", help="how many images [%(default)s]")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="[%(default)s]")
    parser.add_argument("--steps", type=int, metavar="S", help="noise levels visited [ddim: 50; ddpm: all]")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="[%(default)s]")
    parser.add_argument("--batch_size", type=int, metavar="B", help="images at a time [as in pre-training]")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda [cuda if there is one]")
    parser.add_argument("-o", dest="output", metavar="FOLDER", help="[samples, beside the denoiser]")
    parser.epilog = (
        "The n-th image of a seed is the same in a batch of any size. Stopped at any point, or asked for more images,\n"
        "the same command draws those that are missing.\n\n"
        "example:\n"
        "  nnunet_diffusion sample -d 22 -c 2d -p nnUNetDiffusionPlans -n 16\n"
        "  nnunet_diffusion sample --denoiser denoiser.pth --sampler ddpm -n 4 -o samples"
    )


def run(args: argparse.Namespace) -> int:
    """Draws what is missing, then the sheet."""
    from nnunet_diffusion.locks import locked
    from nnunet_diffusion.marks import WORK
    from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
    from nnunet_diffusion.pretraining.diffusion import Diffusion
    from nnunet_diffusion.pretraining.draw import draw_images, number_of_steps
    from nnunet_diffusion.records import sha256
    from nnunet_diffusion.samples import files as sample_files

    if args.number < 1 or args.seed < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise UserError("-n and --batch_size: at least 1; --seed: at least 0")
    path = find_denoiser(args)
    device, content = usable_device(args.device), load_denoiser(path)
    plan, process = content["plan"], content["process"]
    steps = number_of_steps(args.sampler, args.steps, process["timesteps"])
    denoiser = build(content).to(device).eval()
    folder = args.output or os.path.join(os.path.dirname(path), "samples")
    description = {"denoiser": os.path.abspath(path), "denoiser_sha256": sha256(path), "sampler": args.sampler}
    description |= {"steps": steps, "seed": args.seed, "plan": plan}
    description["body_share"] = content["training"].get("body_share", 0.0)
    sample_files.begin(folder, description)
    with locked(os.path.join(folder, WORK, "lock"), f"the samples in {folder}", is_optional=True):
        there = set(sample_files.numbers_in(folder, len(plan["channel_names"])))
        missing = [number for number in range(args.number) if number not in there]
        batch_size = args.batch_size or content["training"].get("batch_size", 1)
        images = draw_images(
            denoiser, Diffusion(**process, device=device), plan["patch_size"], missing, args.sampler, steps, args.seed,
            batch_size, progress=True,
        )  # fmt: skip
        for number, image in zip(missing, (image for batch in images for image in batch.numpy()), strict=True):
            sample_files.write_sample(folder, number, image, plan)
        print(f"{folder}: {len(missing)} image(s) drawn, {args.number - len(missing)} there before")
        draw_sheet(folder, args.number, description)
    return 0


def draw_sheet(folder: str, number: int, description: dict) -> None:
    """Draws samples.png, under real images where the plan's preprocessed data are there; says what the units are."""
    import numpy as np

    from nnunet_diffusion.pretraining.pictures import sample_sheet
    from nnunet_diffusion.samples.files import read_samples
    from nnunet_diffusion.samples.intensities import plan_scales, to_intensities

    plan = description["plan"]
    scales = plan_scales(plan)
    samples = np.stack(list(read_samples(folder, range(min(number, 32)), plan)))
    try:
        real = next(real_batches(description, 1, 8))
    except UserError as error:  # a denoiser can come from anywhere
        print(f"No real images in the sheet: {error}")
        real = samples[:0]
    real, samples = ([to_intensities(image, scales) for image in images] for images in (real, samples))
    how = f"{description['sampler'].upper()}, {description['steps']} steps"
    title = f"{plan['dataset_name']}, {plan['configuration']}: {how}"
    sheet = os.path.join(folder, "samples.png")
    sample_sheet(sheet, np.stack(samples), np.array(real), title)
    for name, scale in zip(plan["channel_names"].values(), scales, strict=True):
        print(f"channel {name}: {scale.unit}")
    print(f"Wrote {sheet}")


def find_denoiser(args: argparse.Namespace) -> str:
    """Returns the file that is named, or the data set's own.

    Raises:
        UserError: If neither is named, or there is none.
    """
    from nnunet_diffusion.plans import plans_in
    from nnunet_diffusion.pretraining.start import first_existing

    if args.denoiser:
        return args.denoiser
    if not args.d or not args.c:
        raise UserError("which denoiser? Give -d and -c, or --denoiser FILE")
    require_folders(("nnUNet_results",))
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        args.p = args.p or only_plans(args)
        folder = get_output_folder(args.d, args.tr, args.p, args.c, args.f)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"-d {args.d}: {error}") from error
    dataset = os.path.basename(os.path.dirname(os.path.dirname(folder)))
    plans = plans_in(os.path.join(os.environ.get("nnUNet_preprocessed", ""), dataset))
    if plans and args.p not in plans:
        raise UserError(f"-p {args.p}: {dataset} has other plans: give -p {' or '.join(plans)}")
    train = f"make one with\n  nnUNetv2_train {args.d} {args.c} {args.f} -tr {args.tr} -p {args.p}"
    return first_existing([os.path.join(folder, "denoiser.pth")], f"{train}\nor name one with --denoiser")


def only_plans(args: argparse.Namespace) -> str:
    """Returns the plans of the only denoiser of data set, trainer, configuration and fold; else nnU-Net's default."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    results = Path(os.environ["nnUNet_results"], maybe_convert_to_dataset_name(args.d))
    found = results.glob(f"{glob.escape(args.tr)}__*__{glob.escape(args.c)}/fold_{glob.escape(args.f)}/denoiser.pth")
    plans = {path.parts[-3].split("__")[1] for path in found}
    return plans.pop() if len(plans) == 1 else "nnUNetPlans"


def real_batches(description: dict, number: int, batch_size: int, dataset: str | None = None):
    """Yields (B, C, X, Y[, Z]) patches of the preprocessed images, labeled and pool, always the same.

    They are drawn as the denoiser was trained: at random, or a share of them centered on the body.

    Args:
        description: Of the samples, with the denoiser's plan.
        number: Of batches.
        batch_size: Patches each.
        dataset: Folder name of another data set in nnUNet_preprocessed, with a plan of the same name.

    Raises:
        UserError: If they are not preprocessed.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_diffusion.files import read_json
    from nnunet_diffusion.plans import read_plans
    from nnunet_diffusion.preprocessing.cases import pool_folder
    from nnunet_diffusion.pretraining.images import ImageDataset, fixed_batches

    require_folders(("nnUNet_preprocessed",))
    plan = description["plan"]
    folder = os.path.join(os.environ["nnUNet_preprocessed"], dataset or plan["dataset_name"])
    content = read_plans(folder, plan["plans_name"])
    if plan["configuration"] not in content["configurations"]:
        raise UserError(f"samples.json: plan.configuration: {folder} has no {plan['configuration']!r}: draw them again")
    plans = PlansManager(content)
    configuration = plans.get_configuration(plan["configuration"])
    folders = [os.path.join(folder, configuration.data_identifier), pool_folder(folder, configuration.data_identifier)]
    images = [image for each in folders if os.path.isdir(each) for image in ImageDataset.get_identifiers(each)]
    if not images:
        raise UserError(f"{folders[0]} holds no preprocessed images: run nnunet_diffusion plan_and_preprocess")
    labels = plans.get_label_manager(read_json(os.path.join(folder, "dataset.json")))
    share = description["body_share"]
    for batch in fixed_batches(ImageDataset(images), number, batch_size, plan["patch_size"], labels, 0, share):
        yield batch["data"].numpy()
