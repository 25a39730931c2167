"""What a denoiser's features know about the organs: a linear probe on every stage, folded at several timesteps.

Logistic regression on the features of single voxels of clean images, trained and tested on different cases, beside the
same network with random weights. It takes a minute, so it is the first thing to look at when pre-training does not
help; how well the features fine-tune is another question (docs/label_efficiency.md).

Example:
    python benchmarks/feature_probe.py 501 2d nnUNetCompactPlans denoiser.pth -o probe.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from tqdm import tqdm

from nnunet_diffusion.files import write_json
from nnunet_diffusion.pretraining.conditioning import fold
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser, rebuild

VOXELS_PER_CLASS = 20  # of a patch


def draw_voxels(seg: np.ndarray, classes: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns some voxels of every class of a patch: indices (N, dim) and their classes (N,)."""
    points = [rng.permutation(np.argwhere(seg == value))[:VOXELS_PER_CLASS] for value in classes]
    return np.concatenate(points), np.repeat(classes, [len(p) for p in points])


@torch.no_grad()
def features(network, loader, batches: int, classes: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the activations of each stage (encoder, then decoder) at voxels of patches, and the voxels' classes."""
    found, labels, activations, rng = [], [], [], np.random.default_rng(0)
    stages = [*network.encoder.stages, *network.decoder.stages]
    hooks = [stage.register_forward_hook(lambda _, __, output: activations.append(output)) for stage in stages]
    for _ in range(batches):
        batch = next(loader)
        activations.clear()
        network(batch["data"])
        for b, seg in enumerate(batch["target"][:, 0].numpy()):
            points, values = draw_voxels(seg, classes, rng)
            # grid_sample wants (x, y[, z]) in [-1, 1], last axis first
            grid = torch.from_numpy((2 * points + 1) / np.array(seg.shape) - 1).flip(1).float()
            grid = grid.reshape(1, len(points), *[1] * (seg.ndim - 1), seg.ndim)
            sampled = [
                F.grid_sample(a[b : b + 1], grid, padding_mode="border", align_corners=False) for a in activations
            ]
            found.append([s.flatten(2)[0].T.numpy() for s in sampled])
            labels.append(values)
    for hook in hooks:
        hook.remove()
    return [np.concatenate(stage) for stage in zip(*found, strict=True)], np.concatenate(labels)


def probe(network, loaders, batches: int, classes: list[int]) -> dict[str, list[float]]:
    """Computes balanced accuracy on the test cases by stage."""
    (train, train_labels), (test, test_labels) = (features(network, loader, batches, classes) for loader in loaders())
    scores = []
    for x, x_test in zip(train, test, strict=True):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight="balanced"))
        classifier.fit(x, train_labels)
        scores.append(round(float(balanced_accuracy_score(test_labels, classifier.predict(x_test))), 3))
    encoder = len(network.encoder.stages)
    return {"encoder": scores[:encoder], "decoder": scores[encoder:]}


def main() -> None:
    """Reads the arguments, probes, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="data set id")
    parser.add_argument("configuration")
    parser.add_argument("plans")
    parser.add_argument("denoiser", help="path of a denoiser.pth")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[0, 50, 150, 300, 500])
    parser.add_argument("--cases", type=int, default=8, help="training cases; tested on fold 0's validation")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("-o", dest="output", help="JSON to write")
    args = parser.parse_args()

    base = Path(nnUNet_preprocessed, maybe_convert_to_dataset_name(args.dataset))
    plans = PlansManager(str(base / f"{args.plans}.json"))
    configuration = plans.get_configuration(args.configuration)
    dataset_json = json.loads((base / "dataset.json").read_text())
    manager = plans.get_label_manager(dataset_json)
    splits = json.loads((base / "splits_final.json").read_text())
    folder = str(base / configuration.data_identifier)

    def loaders():
        np.random.seed(0)
        cases = sorted(np.random.default_rng(0).choice(splits[0]["train"], args.cases, replace=False))
        size = configuration.patch_size
        for chosen in (cases, splits[0]["val"]):
            dataset = infer_dataset_class(folder)(folder, list(chosen))
            yield nnUNetDataLoader(dataset, configuration.batch_size, size, size, manager, 1.0)

    channels = len(dataset_json["channel_names"])

    def random_network():
        torch.manual_seed(0)
        return nnUNetTrainer.build_network_architecture(plans, configuration, channels, channels, False).eval()

    denoiser = rebuild(load_denoiser(args.denoiser), random_network())
    networks = {"random": random_network} | {f"t* = {t}": lambda t=t: fold(denoiser, t).eval() for t in args.timesteps}
    results = {}
    for name, make in tqdm(networks.items(), "probing"):
        results[name] = probe(make(), loaders, args.batches, [0, *manager.foreground_labels])
        tqdm.write(f"{name:>10}  {results[name]}")
    if args.output:
        write_json(args.output, {"what": "balanced accuracy by stage on fold 0's validation cases", **results})


if __name__ == "__main__":
    main()
