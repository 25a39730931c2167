"""`nnunet_diffusion evaluate_samples`: how near drawn images are to real ones."""

import argparse
import math
import os
import sys
from itertools import chain, islice

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import require_folders, usable_device

HELP = "Measure drawn images against real ones: FID, sFID, improved precision and recall, their F1."
NEEDS = ("nnUNet_preprocessed",)
DRAWN_AT_ONCE = 8  # real patches; which ones are drawn depends on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("samples", metavar="SAMPLES", help="folder, as nnunet_diffusion sample leaves it")
    parser.add_argument("-d", metavar="ID", help="data set to compare with [the denoiser's own]")
    parser.add_argument("--features", choices=("encoder", "inception"), default="encoder", help="[%(default)s]")
    parser.add_argument("--denoiser", metavar="FILE", help="whose encoder [the one that drew the samples]")
    parser.add_argument("--inception_weights", metavar="FILE", help="torchvision's inception_v3 [torch's cache]")
    parser.add_argument("--real", type=int, metavar="N", help="real patches to draw [as many as there are samples]")
    parser.add_argument("-k", type=int, default=3, metavar="K", help="neighbors of precision and recall [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="images at a time [%(default)s]")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda [cuda if there is one]")
    parser.epilog = (
        "Real images are random patches of the preprocessed scans, labeled and unlabeled, always the same.\n"
        "Figures by other features, or of other numbers of images, cannot be compared: both stand beside them, in\n"
        "SAMPLES/quality_FEATURES.json too. What they are: docs/samples.md.\n\n"
        "example:\n"
        "  nnunet_diffusion sample -d 22 -c 2d -p nnUNetDiffusionPlans -n 1000 -o samples\n"
        "  nnunet_diffusion evaluate_samples samples"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the figures and writes them beside the samples."""
    from nnunet_diffusion.cli.sample import real_batches
    from nnunet_diffusion.files import write_json
    from nnunet_diffusion.preprocessing.planning import find_dataset
    from nnunet_diffusion.samples.files import numbers_in, read_description, read_samples

    description = read_description(args.samples)
    plan = description["plan"]
    numbers = numbers_in(args.samples, len(plan["channel_names"]))
    number_of_real = len(numbers) if args.real is None else args.real
    if args.k < 1 or args.batch_size < 1 or min(len(numbers), number_of_real) <= max(1, args.k):
        raise UserError(
            f"{args.samples}: {len(numbers)} sample(s) and {number_of_real} real patches: -k {args.k} takes at least "
            f"{max(2, args.k + 1)} of each, and a figure with a meaning takes thousands"
        )
    if args.inception_weights and args.features != "inception":
        raise UserError("--inception_weights: only with --features inception")
    extractor = find_extractor(args, description, usable_device(args.device))
    if args.d:
        require_folders(("nnUNet_raw",))
    dataset = find_dataset(args.d) if args.d else None
    batches = real_batches(description, math.ceil(number_of_real / DRAWN_AT_ONCE), DRAWN_AT_ONCE, dataset)
    real = features(extractor, chain.from_iterable(batches), number_of_real, args.batch_size)
    drawn = features(extractor, read_samples(args.samples, numbers, plan), len(numbers), args.batch_size)
    content = {"features": extractor.name, "compared_with": dataset or plan["dataset_name"]}
    content |= measure(real, drawn, args.k)
    for warning in content["warnings"]:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"{content['samples']} samples, {content['real']} real patches of {content['compared_with']}")
    print(f"features: {extractor.name}")
    for name in ("FID", "sFID", "precision", "recall", "F1"):
        print(f"{name:<10} {content['values'][name]:.4g}")
    path = os.path.join(args.samples, f"quality_{args.features}.json")
    write_json(path, content)
    print(f"Wrote {path}")
    return 0


def find_extractor(args: argparse.Namespace, description: dict, device):
    """Builds the extractor that was asked for.

    Raises:
        UserError: If what it needs is not there.
    """
    from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
    from nnunet_diffusion.records import sha256
    from nnunet_diffusion.samples.features import encoder_features, inception_features

    path = args.denoiser or description["denoiser"]
    content = load_denoiser(path)
    denoiser = build(content).to(device).eval()
    if args.features == "inception":
        return inception_features(args.inception_weights, tuple(denoiser.image_range.tolist()), device)
    its, ours = content["plan"], description["plan"]
    if (its["patch_size"], len(its["channel_names"])) != (ours["patch_size"], len(ours["channel_names"])):
        raise UserError(f"{path} was made for other patches than the samples: give one of the same configuration")
    return encoder_features(denoiser, content["timestep"], sha256(path)[:12])


def features(extractor, images, number: int, batch_size: int) -> list:
    """Extracts pooled and spatial features of the first `number` images, each (number, d)."""
    import numpy as np
    import torch
    from tqdm import tqdm

    images, found = islice(images, number), []
    with tqdm(total=number, desc="features", unit="image") as bar:
        while batch := list(islice(images, batch_size)):
            found.append(extractor.extract(torch.from_numpy(np.stack(batch))))
            bar.update(len(batch))
    return [torch.cat(parts).numpy() for parts in zip(*found, strict=True)]


def measure(real: list, samples: list, k: int) -> dict:
    """Measures all figures; warns of those that too few images make worthless.

    Args:
        real: Pooled (n, d) and spatial (n, s) features.
        samples: The same, (m, d) and (m, s).
        k: Neighbors of precision and recall.
    """
    from nnunet_diffusion.samples.figures import f1, frechet_distance, precision_and_recall

    precision, recall = precision_and_recall(real[0], samples[0], k)
    values = {
        "FID": frechet_distance(real[0], samples[0]),
        "sFID": frechet_distance(real[1], samples[1]),
        "precision": precision,
        "recall": recall,
        "F1": f1(precision, recall),
    }
    fewest = min(len(real[0]), len(samples[0]))
    warnings = [
        f"{name}: {fewest} images for {matrix.shape[1]} features: the covariances are singular and the figure is too "
        "high; compare it with none from another number of images"
        for name, matrix in (("FID", real[0]), ("sFID", real[1]))
        if fewest <= matrix.shape[1]
    ]
    return {"values": values, "real": len(real[0]), "samples": len(samples[0]), "k": k, "warnings": warnings}
