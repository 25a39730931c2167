"""Where a training's first weights come from: a denoiser, a checkpoint of nnU-Net or nnssl, or nothing but chance."""

import os
import re
from collections.abc import Sequence
from os.path import basename, dirname
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape
from nnunet_diffusion.model_folder import load_plain
from nnunet_diffusion.plans import check_plans, without_round
from nnunet_diffusion.pretraining import nnssl
from nnunet_diffusion.pretraining.conditioning import fold
from nnunet_diffusion.pretraining.denoiser_file import (
    check_denoiser,
    differing_weights,
    is_denoiser,
    plan_identity,
    rebuild,
)
from nnunet_diffusion.pretraining.schemas import FirstWeights
from nnunet_diffusion.pretraining.transfer import TransferReport, new_head, plan_differences, transfer
from nnunet_diffusion.schemas import Dataset

DENOISER, SCRATCH = "denoiser", "scratch"  # values of the setting `start`; anything else is a path
REMEDY = "give a denoiser.pth, or a checkpoint that nnU-Net or nnssl wrote"


def find_start(start: str, plans: PlansManager, configuration: str, fold: int | str) -> str:
    """Finds the file that a training starts from.

    Args:
        start: "denoiser" for this data set's own, or a path, absolute or below nnUNet_results/DATASET, in which
            `{fold}` stands for the fold.
        plans: Of the training.
        configuration: Its name.
        fold: A number, or all.

    Raises:
        UserError: If there is none, with what makes one; never silently from scratch.
    """
    if start == DENOISER:
        return first_existing(
            own_pretraining(plans, configuration, fold, "DenoisingDiffusionTrainer", "denoiser.pth"),
            f"make one with\n  {pretraining_command(plans, configuration, 'DenoisingDiffusionTrainer')}\nor give the "
            f'path of a denoiser or a checkpoint with the setting start, or train from random weights with "{SCRATCH}"',
        )
    path = os.path.join(nnUNet_results, plans.dataset_name, start.replace("{fold}", str(fold)))
    if not os.path.isfile(path):
        raise UserError(
            f"the setting start is {start!r}, but there is no {path}: give {DENOISER}, {SCRATCH}, or the path of a "
            "denoiser.pth or of a checkpoint"
        )
    return path


def own_pretraining(plans: PlansManager, configuration: str, fold: int | str, trainer: str, file: str) -> list[str]:
    """Lists where a data set's own result of a pre-training for a plan may be: the own fold's first, then fold all's.

    That of the plans to which those of a round only add settings will do, too, and that of a configuration which this
    one inherits from.

    Args:
        plans: Of the training.
        configuration: Its name.
        fold: The own.
        trainer: Of the pre-training.
        file: In its output folder.
    """
    configurations = [configuration]
    while inherited := plans.plans["configurations"][configurations[-1]].get("inherits_from"):
        configurations.append(inherited)
    return [
        os.path.join(nnUNet_results, plans.dataset_name, f"{trainer}__{plans_name}__{name}", f"fold_{number}", file)
        for plans_name in dict.fromkeys((plans.plans_name, without_round(plans.plans_name)))
        for name in configurations
        for number in dict.fromkeys((fold, "all"))
    ]


def first_existing(candidates: list[str], how_to_make_one: str) -> str:
    """Returns the first of these files that exists.

    Raises:
        UserError: If none does; never silently from scratch.
    """
    for path in candidates:
        if os.path.isfile(path):
            return path
    looked = "\n".join(f"  {path}" for path in candidates)
    raise UserError(f"no denoiser to start from, looked for\n{looked}\n{how_to_make_one}")


def pretraining_command(plans: PlansManager, configuration: str, trainer: str) -> str:
    """Returns the command that makes the result of a pre-training for a plan."""
    dataset_id = plans.dataset_name[len("Dataset") : len("Dataset") + 3]
    return f"nnUNetv2_train {dataset_id} {configuration} all -tr {trainer} -p {without_round(plans.plans_name)}"


def seen_images(path: str, fold: int | str) -> str:
    """Says in words that a pre-training of fold `all` has seen the images of the validation cases; empty if not."""
    if fold == "all" or basename(dirname(path)) != "fold_all":
        return ""
    return (
        f"{path} has seen the images (no labels) of all cases, those of fold {fold}'s validation among them: for "
        f"validation on unseen images pre-train with fold {fold}"
    )


def load_first_weights(
    path: str,
    network: nn.Module,
    planned: Sequence[nn.Module],
    plans: PlansManager,
    configuration: str,
    dataset_json: dict,
    timestep: int,
) -> TransferReport:
    """Loads a denoiser or others' weights into planned networks, or a checkpoint into the network that trains.

    Args:
        path: Of the file; what it is, its content says.
        network: The network that trains, whose weights a checkpoint of the same labels holds, output heads included.
        planned: What of it, or beside it, has the planned topology: each starts from a denoiser, from an encoder of
            nnssl or from a model of other labels, with its own heads.
        plans: Of the training.
        configuration: Its name.
        dataset_json: The content of dataset.json.
        timestep: t*, at which a denoiser is folded.

    Returns:
        What became of every parameter; of several planned networks, of the first one.

    Raises:
        UserError: If the file is none of these, is damaged or holds code, or does not fit.
    """
    content = load_plain(path, REMEDY)
    now = plan_identity(plans, configuration, dataset_json)
    if is_denoiser(content):
        check_denoiser(content, path)
        folded = fold_for_plan(path, content, plans, configuration, timestep)
        reports = [transfer(each, folded, len(dataset_json["channel_names"])) for each in planned]
        reports[0].source, reports[0].timestep = path, timestep
        reports[0].warnings = plan_differences(content["plan"], now)
        return reports[0]
    if nnssl.is_nnssl(content):
        kind = now["network_class"].split(".")[-1]
        return [nnssl.transfer_encoder(path, content, each, now, kind) for each in planned][0]
    refuse_earlier_nnunet(content, path)
    check_shape(content, FirstWeights, path, REMEDY)
    weights, channels = content["network_weights"], len(dataset_json["channel_names"])
    if is_model_of(content, network, dataset_json):
        network.load_state_dict(weights)
        report = TransferReport(matched=[name for name, _ in network.named_parameters()])
    else:
        report = [transfer_model(path, weights, each, channels) for each in planned][0]
    report.source = path
    report.warnings += checkpoint_differences(content["init_args"], now)
    return report


def refuse_earlier_nnunet(content: Any, path: str) -> None:
    """Refuses by name what nnU-Net v1 wrote, the models of the MultiTalent paper among it."""
    if isinstance(content, dict) and "state_dict" in content and "network_weights" not in content:
        raise UserError(f"{path} holds a state_dict, as models of nnU-Net v1 do, of other networks: {REMEDY}")


def is_model_of(content: dict[str, Any], network: nn.Module, dataset_json: dict) -> bool:
    """Says whether a checkpoint is of just this network, and its outputs mean the same labels."""
    expected = {name: weight.shape for name, weight in network.state_dict().items()}
    found = {name: weight.shape for name, weight in content["network_weights"].items()}
    return found == expected and content["init_args"]["dataset_json"].get("labels") == dataset_json["labels"]


def transfer_model(path: str, weights: dict[str, Tensor], network: nn.Module, image_channels: int) -> TransferReport:
    """Copies encoder and decoder of a model of other labels into a planned network, whose output heads are new.

    MultiTalent's models are among these: their heads are those of many data sets. Where they have a stem for each data
    set (`encoder.stem.ID.`), none of which is this one's, the stem stays as it was initialized.

    Args:
        path: Of the checkpoint.
        weights: Its weights.
        network: The planned network, changed in place.
        image_channels: How many of its input channels are images.

    Raises:
        UserError: If they do not fit.
    """
    has_many_stems = any(re.match(r"encoder\.stem\.(?!convs\.)[^.]+\.convs\.", name) for name in weights)

    def why_it_stays(name: str) -> str:
        is_stem = has_many_stems and name.startswith("encoder.stem.")
        return new_head(name) or ("the file has a stem for each of its data sets" if is_stem else "")

    own = {name: weight for name, weight in weights.items() if not name.startswith("decoder.encoder.")}
    try:
        report = transfer(network, own, image_channels, why_it_stays, "checkpoint")
    except UserError as error:
        raise UserError(f"{path}: {error}\ngive weights of the same plan, or plan as that model was planned") from error
    if has_many_stems:
        report.warnings.append("the stem is random: a trainer that freezes the encoder would never train it")
    return report


def checkpoint_differences(init_args: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists differences of a checkpoint's plan to this training's, see `plan_differences`, if it says what it was.

    Args:
        init_args: What its trainer was built from.
        now: The `plan_identity` of this training.
    """
    try:
        check_plans(init_args.get("plans"), "plans")
        check_shape(init_args["dataset_json"], Dataset, "dataset.json")
        trained = plan_identity(PlansManager(init_args["plans"]), init_args["configuration"], init_args["dataset_json"])
        return plan_differences(trained, now)
    except Exception:  # of whatever kind: other programs and other versions write plans of their own
        return ["the checkpoint does not say which spacing and normalization it was trained with"]


def fold_for_plan(
    path: str, content: dict[str, Any], plans: PlansManager, configuration: str, timestep: int
) -> dict[str, Tensor]:
    """Returns the weights of a denoiser folded at t*; refuses one whose topology or timesteps are others."""
    timesteps = content["process"]["timesteps"]
    if not 0 <= timestep < timesteps:
        raise UserError(f"the setting timestep is {timestep}: {path} knows 0 to {timesteps - 1}")
    channels = len(content["plan"]["channel_names"])
    chosen = plans.get_configuration(configuration)
    planned = nnUNetTrainer.build_network_architecture(plans, chosen, channels, channels, False)
    try:
        return fold(rebuild(content, planned), timestep).state_dict()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refuse_misfit(path: str, network: nn.Module) -> None:
    """Refuses a file of `-pretrained_weights` of which nnU-Net would only say which of its assertions failed.

    Args:
        path: A checkpoint of nnU-Net, or a denoiser.
        network: The network that trains, without wrappers; output heads are not compared, nnU-Net leaves them out.

    Raises:
        UserError: If it is damaged, holds code, is something else, or has other weights; names them.
    """
    content = load_plain(path, "give a checkpoint that nnU-Net wrote, or a denoiser.pth")
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path} has no network_weights: give a checkpoint that nnU-Net wrote, or a denoiser.pth")
    sides = ({k: v for k, v in state.items() if ".seg_layers." not in k} for state in (weights, network.state_dict()))
    if table := differing_weights("file", *sides):
        raise UserError(
            f"-pretrained_weights {path} does not fit the network of this training: {table}\ngive weights of the same "
            "plan; a denoiser with other input channels can be given with the setting start, which adapts them"
        )
