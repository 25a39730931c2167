"""How each member of a network of several does, beside all of them together."""

import os
from collections.abc import Sequence
from datetime import timedelta

from batchgenerators.utilities.file_and_folder_operations import load_json
from torch import distributed

from nnunet_diffusion.files import write_json


def add_members(output_folder: str, groups: Sequence[Sequence[str]]) -> str:
    """Adds `members` to `validation/summary.json`: the means of each member's own summary.

    Args:
        output_folder: Of the fold; the members' summaries are in its `member_k/validation`.
        groups: The labels that each member's group annotates.

    Returns:
        What they say, in words.
    """
    path = os.path.join(output_folder, "validation", "summary.json")
    summary, members = load_json(path), []
    for k, labels in enumerate(groups):
        own = load_json(os.path.join(output_folder, f"member_{k}", "validation", "summary.json"))
        members.append({"group": list(labels), "mean": own["mean"], "foreground_mean": own["foreground_mean"]})
    write_json(path, {**summary, "members": members})
    dice = [f"member {k} {member['foreground_mean']['Dice']:.4f}" for k, member in enumerate(members)]
    return f"Mean Validation Dice: {', '.join(dice)}, all together {summary['foreground_mean']['Dice']:.4f}"


def patient_group() -> distributed.ProcessGroup:
    """Returns a group of all processes that wait for each other as long as an evaluation takes.

    NCCL, which computes together, gives up after ten minutes.
    """
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))
