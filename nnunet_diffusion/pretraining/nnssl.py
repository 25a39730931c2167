"""nnssl's checkpoints (MIC-DKFZ/nnssl): denoiser.pth can be read as one, and trainings start from others' encoders.

nnU-Net's development head reads the keys that `adaptation_plan` writes, without a default. Such a checkpoint gives the
encoder and its stem; the decoder is the training's own.
"""

import re
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import NotRequired

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape
from nnunet_diffusion.pretraining.conditioning import Denoiser
from nnunet_diffusion.pretraining.schemas import Weights
from nnunet_diffusion.pretraining.transfer import TransferReport, new_head, transfer
from nnunet_diffusion.schemas import Strict, first_problem

KEY = "nnssl_adaptation_plan"
RESIDUAL, PLAIN = "ResidualEncoderUNet", "PlainConvUNet"
NETWORKS = {"ResEncL": RESIDUAL, RESIDUAL: RESIDUAL, PLAIN: PLAIN}  # those of which encoders can be taken
REMEDY = "give a checkpoint of nnssl that carries its adaptation plan, a denoiser.pth, or a checkpoint of nnU-Net"
NNUNET = (
    "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a "
    "self-configuring method for deep learning-based biomedical image segmentation. Nature Methods, 18(2), 203-211."
)
DDPM = (
    "Ho, J., Jain, A., & Abbeel, P. (2020). Denoising diffusion probabilistic models. Advances in Neural Information "
    "Processing Systems, 33, 6840-6851."
)


class Architecture(Strict):
    """Which network was pre-trained."""

    arch_class_name: str


class PretrainedConfiguration(Strict):
    """What a scan was made into; a spacing of None is each scan's own."""

    spacing: NotRequired[list[float | None] | tuple[float | None, ...] | None]
    normalization_schemes: NotRequired[list[str]]


class PretrainPlan(Strict):
    """The plan of the pre-training; the first configuration is the one that was trained."""

    configurations: Annotated[dict[str, PretrainedConfiguration], Field(min_length=1)]


class AdaptationPlan(Strict):
    """What says where in a checkpoint the encoder is."""

    architecture_plans: Architecture
    pretrain_plan: PretrainPlan
    key_to_encoder: str
    key_to_stem: str


class Pretrained(Strict):
    """A checkpoint of nnssl, as far as it is used."""

    network_weights: Weights
    nnssl_adaptation_plan: AdaptationPlan


class Citation(Strict):
    """What should be cited for a part of a pre-training."""

    type: NotRequired[str]
    name: NotRequired[str]
    apa_citations: NotRequired[list[str]]
    bibtex_citations: NotRequired[list[str]]


def adaptation_plan(denoiser: Denoiser, plan: dict) -> dict[str, Any]:
    """Describes a denoiser's backbone as nnssl's checkpoints do.

    Args:
        denoiser: With nnU-Net's network in it.
        plan: Its `plan_identity`.
    """
    network = denoiser.network
    configuration = {key: plan[key] for key in ("spacing", "patch_size", "normalization_schemes")}
    return {
        "architecture_plans": {
            "arch_class_name": plan["network_class"],
            "arch_kwargs": plan["network_kwargs"],
            "arch_kwargs_requiring_import": plan["network_kwargs_requiring_import"],
        },
        "pretrain_plan": {
            "dataset_name": plan["dataset_name"],
            "plans_name": plan["plans_name"],
            "configurations": {plan["configuration"]: configuration},
        },
        "pretrain_num_input_channels": len(denoiser.input_scale),
        "recommended_downstream_patchsize": plan["patch_size"],
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,  # of the position embedding, which no U-Net has
    }


def citations(plan: dict) -> list[dict[str, Any]]:
    """Lists what whoever uses a denoiser should cite, as nnssl's checkpoints do; `plan` is its `plan_identity`."""
    return [
        {"type": "Architecture", "name": plan["network_class"].split(".")[-1], "apa_citations": [NNUNET]},
        {"type": "Pretraining Method", "name": "Denoising diffusion (nnunet_diffusion)", "apa_citations": [DDPM]},
    ]


def is_nnssl(content: Any) -> bool:
    """Says whether a loaded file calls itself a checkpoint of nnssl."""
    return isinstance(content, dict) and KEY in content


def transfer_encoder(path: str, content: dict[str, Any], network: nn.Module, now: dict, kind: str) -> TransferReport:
    """Copies the encoder of a checkpoint into a planned network; its decoder stays as it was initialized.

    Args:
        path: Of the checkpoint, for messages.
        content: From `load_plain`.
        network: The planned network, changed in place.
        now: The `plan_identity` of this training.
        kind: The planned network's class, such as "ResidualEncoderUNet".

    Returns:
        The report, with the plans' differences and what is to be cited.

    Raises:
        UserError: If the file lacks something, has another kind of network, or its encoder does not fit.
    """
    check_shape(content, Pretrained, path, REMEDY)
    plan = content[KEY]
    refuse_other_kind(path, plan["architecture_plans"]["arch_class_name"], kind)
    weights = with_own_names(content["network_weights"], plan, network)
    try:
        report = transfer(
            network, weights, len(now["channel_names"]), lambda name: why_it_stays(name, weights), "checkpoint", True
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    report.source = path
    report.warnings = plan_differences(next(iter(plan["pretrain_plan"]["configurations"].values())), now)
    report.citations = readable_citations(content.get("citations"))
    return report


def refuse_other_kind(path: str, name: str, kind: str) -> None:
    """Raises UserError if an encoder is of another kind than the planned one, or of one that no plan has."""
    found = NETWORKS.get(name.split(".")[-1])
    if found is None:
        raise UserError(
            f"{path} is a {name!r}: only encoders of {', '.join(NETWORKS)} fit nnU-Net's planned networks; Primus and "
            f"networks without skip connections have none of that kind: {REMEDY}"
        )
    if found != kind:
        how = "DiffusionPlannerL, or one of nnU-Net's ResEnc planners" if found == RESIDUAL else "nnU-Net's own planner"
        raise UserError(f"{path} is a {name!r}, the plan's network a {kind}: plan with {how}")


def with_own_names(weights: dict[str, Tensor], plan: dict, network: nn.Module) -> dict[str, Tensor]:
    """Returns the encoder's weights by the names that they have in the planned network, all others by their own."""
    stem = "encoder.stages.0" if getattr(network.encoder, "stem", None) is None else "encoder.stem"
    places = {plan["key_to_stem"]: stem, plan["key_to_encoder"]: "encoder.stages"}  # the stem may lie in the encoder
    named = {}
    for name, weight in weights.items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is not None:
            named[places[place] + name.removeprefix(place)] = weight
        elif not name.startswith(("encoder.", "decoder.encoder.")):  # what the plan does not point to; aliases
            named[name] = weight
    return named


def why_it_stays(name: str, weights: dict[str, Tensor]) -> str:
    """Says why a parameter is not taken from an encoder with these weights; empty if it must be."""
    stage = re.match(r"encoder\.stages\.\d+\.", name)
    if stage and stage[0] != "encoder.stages.0." and not any(key.startswith(stage[0]) for key in weights):
        return "the file's encoder has not so many stages"
    return new_head(name) or ("" if name.startswith("encoder.") else "of the decoder, the encoder alone is taken")


def plan_differences(trained: dict[str, Any], now: dict) -> list[str]:
    """Lists what means something else than it did in the pre-training; one sentence each.

    Args:
        trained: The first configuration of the checkpoint's plan.
        now: The `plan_identity` of this training.
    """
    differences = []
    spacing = list(trained.get("spacing") or [None])
    if None in spacing:
        differences.append(f"spacing differs: pre-trained with that of each scan, now {now['spacing']}")
    elif spacing != now["spacing"]:
        differences.append(f"spacing differs: pre-trained with {spacing}, now {now['spacing']}")
    schemes = trained.get("normalization_schemes", "what the file does not say")
    if set(schemes) != set(now["normalization_schemes"]):
        differences.append(
            f"normalization differs: pre-trained with {schemes}, now {now['normalization_schemes']}: the same tissue "
            "has other values"
        )
    return differences


def readable_citations(given: Any) -> list[str]:
    """Returns what a file asks to be cited, one text each; nothing of what is not written as nnssl does.

    The text goes to logs: control characters, with which a terminal can be made to do things, are left out.
    """
    if given is None or first_problem(given, list[Citation]):
        return []
    texts = []
    for citation in sorted(given, key=lambda one: one.get("type", "")):
        papers = citation.get("apa_citations") or citation.get("bibtex_citations") or []
        text = f"{citation.get('name', '?')} ({citation.get('type', '?')}): {' '.join(papers)}"
        texts.append(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
    return texts
