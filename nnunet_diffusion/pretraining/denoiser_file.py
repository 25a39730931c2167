"""denoiser.pth: what pre-training leaves behind; plain tensors and plain values only."""

import json
import re
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, check_shape
from nnunet_diffusion.model_folder import load_plain
from nnunet_diffusion.pretraining import nnssl
from nnunet_diffusion.pretraining.conditioning import Denoiser, condition, fold
from nnunet_diffusion.pretraining.schemas import Denoiser as DenoiserContent

FORMAT = "nnunet_diffusion denoiser"
FORMAT_VERSION = 1
NETWORKS = re.compile(r"dynamic_network_architectures\.architectures\.unet\.(PlainConvUNet|ResidualEncoderUNet)")
MODULES = re.compile(r"torch\.nn\.(modules\.[a-z]+\.)?[A-Z]\w*")


def plan_identity(plans_manager, configuration_name: str, dataset_json: dict) -> dict[str, Any]:
    """Returns what a fine-tuning plan must share with the pre-training plan, as plain values.

    Args:
        plans_manager: nnU-Net's.
        configuration_name: "2d", "3d_fullres", ...
        dataset_json: The content of dataset.json.

    Returns:
        Names, spacing (mm), patch size (voxels), normalization with its intensity statistics, and the topology.
    """
    configuration = plans_manager.get_configuration(configuration_name)
    identity = {
        "dataset_name": plans_manager.dataset_name,
        "plans_name": plans_manager.plans_name,
        "configuration": configuration_name,
        "spacing": configuration.spacing,
        "patch_size": configuration.patch_size,
        "transpose_forward": plans_manager.transpose_forward,
        "normalization_schemes": configuration.normalization_schemes,
        "intensities": plans_manager.foreground_intensity_properties_per_channel,
        "channel_names": dataset_json["channel_names"],
        "network_class": configuration.network_arch_class_name,
        "network_kwargs": configuration.network_arch_init_kwargs,
        "network_kwargs_requiring_import": configuration.network_arch_init_kwargs_req_import,
    }
    return json.loads(json.dumps(identity, default=lambda value: value.tolist()))


def save_denoiser(path: str, denoiser: Denoiser, timestep: int, process: dict, plan: dict, training: dict) -> None:
    """Writes a denoiser whole or not at all.

    Args:
        path: Usually `denoiser.pth` in the fold's folder.
        denoiser: Its averaged (EMA) weights.
        timestep: The default t*; the fold there goes under nnU-Net's key `network_weights`, so that stock nnU-Net can
            start from the file with `-pretrained_weights`.
        process: Schedule, number of timesteps, prediction.
        plan: From `plan_identity`.
        training: What it was trained on, for how long, how well.
    """
    folded = {name: tensor.cpu() for name, tensor in fold(denoiser, timestep).state_dict().items()}
    content = {
        "network_weights": folded,
        "timestep": timestep,
        "denoiser_weights": {name: tensor.cpu() for name, tensor in denoiser.state_dict().items()},
        "process": process,
        "plan": plan,
        "training": training,
        nnssl.KEY: nnssl.adaptation_plan(denoiser, plan),
        "citations": nnssl.citations(plan),
    }
    save_own(path, FORMAT, FORMAT_VERSION, content)


def save_own(path: str, file_format: str, format_version: int, content: dict[str, Any]) -> None:
    """Writes plain tensors and values whole or not at all, with their format and the versions that made them."""
    versions = {name: version(name) for name in ("nnunet_diffusion", "nnunetv2", "torch")}
    with atomic(path) as temporary:
        torch.save(
            {"format": file_format, "format_version": format_version, "versions": versions, **content}, temporary
        )


def load_denoiser(path: str) -> dict[str, Any]:
    """Loads the content of a denoiser file as `save_denoiser` wrote it.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is damaged or holds code, and as `check_own`.
    """
    content = load_own(path, "denoiser", "DenoisingDiffusionTrainer")
    check_denoiser(content, path)
    return content


def is_denoiser(content: Any) -> bool:
    """Says whether a loaded file calls itself a denoiser."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_denoiser(content: Any, path: str) -> None:
    """Refuses what is no denoiser; for the errors see `check_own`."""
    check_own(content, path, FORMAT, FORMAT_VERSION, "DenoisingDiffusionTrainer", DenoiserContent)
    scale = content["denoiser_weights"].get("input_scale")
    if scale is None or scale.shape != (len(content["plan"]["channel_names"]),) or not (0 < scale).all():
        raise UserError(
            f"{path}: denoiser_weights.input_scale: must be a positive number for each channel of plan.channel_names, "
            f"not {scale}: {remedy_for('denoiser', 'DenoisingDiffusionTrainer')}"
        )


def load_own(path: str, what: str, trainer: str) -> Any:
    """Loads a file that one of our trainers writes; see `model_folder.load_plain`."""
    try:
        return load_plain(path, remedy_for(what, trainer))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} {path}: check the path, or pre-train one") from None


def remedy_for(what: str, trainer: str) -> str:
    """Returns what to do about a file that cannot be used."""
    return f"give a {what}.pth that {trainer} wrote, or delete it and repeat the pre-training command with --val"


def check_own(content: Any, path: str, file_format: str, format_version: int, trainer: str, schema: Any) -> None:
    """Refuses the content of a file that is not what one of our trainers writes.

    Args:
        content: What it holds.
        path: The file, for the message.
        file_format: What it says that it is, such as "nnunet_diffusion denoiser".
        format_version: Which version of that this library reads.
        trainer: What writes such files.
        schema: What it holds, of `nnunet_diffusion.schemas`.

    Raises:
        UserError: If it is another kind of checkpoint, comes from a later version, or lacks something; names it.
    """
    what = file_format.split()[-1]
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise UserError(f"{path} is no {what} of nnunet_diffusion: give a file that {trainer} wrote")
    if content.get("format_version") != format_version:
        raise UserError(
            f"{path} has format version {content.get('format_version')} (versions {content.get('versions')}), this "
            f"library reads {format_version}: install the version that wrote it, or pre-train again"
        )
    check_shape(content, schema, path, remedy_for(what, trainer))


def rebuild(content: dict[str, Any], network: nn.Module) -> Denoiser:
    """Returns the denoiser of a file, on a freshly built planned network with one output per image channel.

    Args:
        content: From `load_denoiser`.
        network: The planned network, with as many input and output channels as the file's images.

    Raises:
        UserError: If the topologies differ; the message lists the parameters that do not match.
    """
    weights = content["denoiser_weights"]
    denoiser = condition(network, len(weights["input_scale"]))
    refuse_other_topology("denoiser", weights, denoiser.state_dict(), content["plan"])
    denoiser.load_state_dict(weights)
    return denoiser


def refuse_other_topology(what: str, weights: dict, expected: dict, plan: dict) -> None:
    """Raises UserError, with a table, if the weights of a file are not those that the plan's network has.

    Args:
        what: The file's kind, for the message.
        weights: Its state dict.
        expected: The network's state dict.
        plan: The file's plan identity.
    """
    if table := differing_weights(what, weights, expected):
        raise UserError(
            f"the {what} was made for another topology ({plan['dataset_name']}, {plan['plans_name']}, "
            f"{plan['configuration']}): {table}\npre-train with this plan, or plan this data set like "
            "that one (nnunet_diffusion plan_and_preprocess --like)"
        )


def differing_weights(what: str, weights: dict, expected: dict) -> str:
    """Returns a table of the weights whose shapes are not as expected; empty if all are.

    Args:
        what: The weights are of, for the table.
        weights: A state dict.
        expected: The network's state dict.
    """
    rows = [
        f"  {name}: {what} {_shape(weights.get(name))}, planned network {_shape(expected.get(name))}"
        for name in sorted({**weights, **expected})
        if _shape(weights.get(name)) != _shape(expected.get(name))
    ]
    shown = "\n".join(rows[:20] + [f"  and {len(rows) - 20} more"] * (len(rows) > 20))
    return f"{len(expected) - len(rows)} of {len(expected)} weights match, these do not\n{shown}" if rows else ""


def build(content: dict[str, Any]) -> Denoiser:
    """Builds the denoiser of a file with nothing but the file: no plan, no data set.

    Args:
        content: From `load_denoiser`.

    Raises:
        UserError: If it names another network than nnU-Net plans. Names are looked up and called, so a file from
            somebody else must not be free to choose them.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plan, channels = content["plan"], len(content["denoiser_weights"]["input_scale"])
    imported = plan["network_kwargs_requiring_import"]
    modules = [str(plan["network_kwargs"][key]) for key in imported if plan["network_kwargs"].get(key) is not None]
    strange = [name for name in [plan["network_class"]] if not NETWORKS.fullmatch(name)]
    strange += [name for name in modules if not MODULES.fullmatch(name)]
    if strange:
        raise UserError(f"the denoiser asks for {', '.join(strange)}: only nnU-Net's U-Nets are built from a file")
    try:
        network = get_network_from_plans(
            plan["network_class"], plan["network_kwargs"], imported, channels, channels, deep_supervision=False
        )
    except Exception as error:  # the network's own, of whatever kind
        raise UserError(f"the denoiser's plan.network_kwargs make no network ({error!r}): take another file") from error
    return rebuild(content, network)


def _shape(tensor: Any) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape)) if hasattr(tensor, "shape") else repr(tensor)
