"""Model folders that plain nnU-Net predicts with, with nothing of this package installed."""

import os
import shutil
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_diffusion import installation
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic_folder, read_json, write_json
from nnunet_diffusion.model_folder import find_folds, load_checkpoint, load_predictor, trainers_of
from nnunet_diffusion.plans import check_plans
from nnunet_diffusion.schemas import Dataset

REMEDY = "take it from the model folder as it was trained"
PARTIAL = "owned"  # among the weights of networks that know a part of the labels each
DESCRIPTIONS = ("plans.json", "dataset.json", "dataset_fingerprint.json")
CASE_TABLES = ("dataset", "unlabeled", "annotated_labels", "union_labels", "converted_from")  # of dataset.json


def export_stock(
    source: str, destination: str, folds: list[str] | None, checkpoint_name: str, member: int | None = None
) -> list[str]:
    """Copies a model folder so that it names nnU-Net's own trainer and no case, and proves that it predicts the same.

    Args:
        source: Model folder, `.../DatasetXXX/TRAINER__PLANS__CONFIGURATION`.
        destination: Folder to create; it appears when everything has been proven, or not at all.
        folds: Such as ["0", "all"]; None takes every fold that has the checkpoint.
        checkpoint_name: File in each `fold_X` to export.
        member: Of a model of several networks, the one to export.

    Returns:
        The exported folds.

    Raises:
        UserError: If `destination` exists, something is missing or unreadable, or the trainer's network is not the one
            that nnU-Net builds from the same plan.
    """
    folds = find_folds(source, folds, checkpoint_name)
    with atomic_folder(destination) as temporary:
        for fold in folds:
            paths = (os.path.join(root, f"fold_{fold}", checkpoint_name) for root in (source, temporary))
            rewrite_checkpoint(*paths, member)
        for file in DESCRIPTIONS:
            if os.path.exists(os.path.join(source, file)):
                shutil.copyfile(os.path.join(source, file), os.path.join(temporary, file))
        dataset_json = os.path.join(temporary, "dataset.json")
        write_json(dataset_json, without_cases(read_json(dataset_json, Dataset, REMEDY)))
        prove_same(source, temporary, folds, checkpoint_name, member)
    return folds


def rewrite_checkpoint(source: str, destination: str, member: int | None = None) -> None:
    """Copies a checkpoint under nnU-Net's own trainer name and without the names of cases; the rest stays as it is."""
    checkpoint = load_checkpoint(source)
    if member is not None:
        take_member(checkpoint, member)
    refuse_other_topology(os.path.dirname(os.path.dirname(source)), checkpoint, member)
    checkpoint["init_args"]["dataset_json"] = without_cases(checkpoint["init_args"]["dataset_json"])
    checkpoint["exported_from"] = checkpoint["trainer_name"]
    checkpoint["trainer_name"] = nnUNetTrainer.__name__
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    torch.save(checkpoint, destination)


def without_cases(dataset_json: dict[str, Any]) -> dict[str, Any]:
    """Leaves out of dataset.json the names of cases and the paths of their files, which no prediction needs."""
    return {key: value for key, value in dataset_json.items() if key not in CASE_TABLES}


def take_member(checkpoint: dict[str, Any], member: int) -> None:
    """Leaves of a checkpoint of several networks the weights of one, and no optimizer.

    Raises:
        UserError: If there is no such member, or the members know a part of the labels only.
    """
    name, weights = checkpoint["trainer_name"], checkpoint["network_weights"]
    found = sorted({int(key.split(".")[1]) for key in weights if key.startswith("members.")})
    if member not in found:
        known = f"members 0 to {found[-1]}" if found else "one network: leave out --member"
        raise UserError(f"--member {member}: the model of {name} has {known}")
    if PARTIAL in weights:
        raise UserError(f"the members of {name} know a part of the labels each: export one of MutualSimilarityTrainer")
    prefix = f"members.{member}."
    own = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    checkpoint.update(network_weights=own, optimizer_state=None, exported_member=member)


def refuse_other_topology(folder: str, checkpoint: dict[str, Any], member: int | None = None) -> None:
    """Raises UserError unless the checkpoint's trainer builds the network that nnU-Net builds from the same plan.

    Compares the names and shapes of all weights: of both networks, and of what the checkpoint holds.
    """
    name, configuration = checkpoint["trainer_name"], checkpoint["init_args"]["configuration"]
    with trainers_of(installation.with_our_trainers(installation.ext_trainer_folders())):
        trainer = recursive_find_trainer_class_by_name(name)
    try:
        planned, built = (build(folder, configuration, each) for each in (nnUNetTrainer, trainer))
    except UserError:
        raise
    except Exception as error:  # whatever the keywords of a network and the labels provoke
        raise UserError(
            f"{folder}: no network can be built from its plans.json and dataset.json ({error!r}): {REMEDY}"
        ) from error
    built = built if member is None else built.members[member]
    expected = shapes(planned.state_dict())
    for found in (shapes(built.state_dict()), shapes(checkpoint["network_weights"])):
        differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"{name} cannot be exported as stock: {len(differing)} weights are not as in the network that nnU-Net "
                f"plans, such as {key!r} ({found.get(key, 'absent')}, planned: {expected.get(key, 'absent')}). "
                "Predict with nnUNet_extTrainer set instead (nnunet_diffusion env)"
                + (", or export one of its members with --member" if hasattr(built, "members") else "")
            )
    foreign = {type(m).__module__ for m in planned.modules() if type(m).__module__.startswith("nnunet_diffusion")}
    if foreign:
        raise UserError(f"{name} cannot be exported as stock: its plan's network needs {', '.join(sorted(foreign))}")


def build(folder: str, configuration: str, trainer: type[nnUNetTrainer]) -> torch.nn.Module:
    """Builds the network of a model folder as prediction does."""
    path = os.path.join(folder, "plans.json")
    content = read_json(path, remedy=REMEDY)
    check_plans(content, path)
    if configuration not in content["configurations"]:
        raise UserError(f"{path}: has no configuration {configuration!r}, which its checkpoint was made for: {REMEDY}")
    plans = PlansManager(content)
    dataset_json = read_json(os.path.join(folder, "dataset.json"), Dataset, REMEDY)
    chosen = plans.get_configuration(configuration)
    channels = determine_num_input_channels(plans, chosen, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    return trainer.build_network_architecture(plans, chosen, channels, heads, enable_deep_supervision=False)


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight."""
    return {key: tuple(weight.shape) for key, weight in weights.items()}


def prove_same(source: str, exported: str, folds: list[str], checkpoint_name: str, member: int | None = None) -> None:
    """Predicts one random patch with both folders, loaded by nnU-Net, the exported one with its own trainers only.

    Raises:
        UserError: If an output differs in a single bit.
    """
    with trainers_of(installation.with_our_trainers(installation.ext_trainer_folders())):
        ours = load_predictor(source, folds, checkpoint_name)
    if member is not None:
        ours.network.only = member
    with trainers_of(""):
        stock = load_predictor(exported, folds, checkpoint_name)
    assert ours.allowed_mirroring_axes == stock.allowed_mirroring_axes
    channels = determine_num_input_channels(ours.plans_manager, ours.configuration_manager, ours.dataset_json)
    patch_shape = (1, channels, *ours.configuration_manager.patch_size)
    patch = torch.randn(patch_shape, generator=torch.Generator().manual_seed(0))
    pairs = zip(folds, ours.list_of_parameters, stock.list_of_parameters, strict=True)
    for fold, our_weights, stock_weights in tqdm(pairs, "proving", total=len(folds), unit="fold"):
        outputs = predict(ours.network, our_weights, patch), predict(stock.network, stock_weights, patch)
        if not torch.equal(*outputs):
            raise UserError(
                f"{ours.trainer_name} cannot be exported as stock: in fold {fold}, plain nnU-Net's output differs "
                f"by up to {(outputs[0] - outputs[1]).abs().max():.3g}. Predict with nnUNet_extTrainer set instead"
            )


@torch.inference_mode()
def predict(network: torch.nn.Module, weights: dict[str, torch.Tensor], patch: torch.Tensor) -> torch.Tensor:
    """Returns the network's float32 output; nnU-Net's own sliding window rounds it to half precision."""
    network.load_state_dict(weights)
    return network.eval()(patch)
