"""What may be loaded and built: files that are cut, and plans that describe no network, are refused by name."""

import copy

import minimal
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import load_plain, refuse_unbuildable

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv2d", "kernel_sizes": [3, 3],
        "strides": [1, 2], "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "norm_op_kwargs": {"affine": True},
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
}  # fmt: skip


def plans(**changed) -> PlansManager:
    content = minimal.plans("2d")
    content["configurations"]["2d"]["architecture"] = copy.deepcopy(ARCHITECTURE) | changed
    return PlansManager(content)


def test_a_plan_that_describes_no_network_is_named():
    refuse_unbuildable(plans(), "2d", 1)
    kwargs = ARCHITECTURE["arch_kwargs"]
    for changed in (
        {"arch_kwargs": {}},
        {"arch_kwargs": kwargs | {"strides": 5.5}},
        {"arch_kwargs": kwargs | {"conv_op": "no.such.module"}},
        {"_kw_requires_import": ["nothing"]},
        {"network_class_name": "dynamic_network_architectures.architectures.unet.NoNet"},
    ):
        with pytest.raises(UserError, match=r"nnUNetPlans.json: configurations.2d.architecture: no network can be bui"):
            refuse_unbuildable(plans(**changed), "2d", 1)


def test_a_file_cut_anywhere_is_named(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"network_weights": {str(i): torch.zeros(50) for i in range(5)}}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.pth cannot be read, it is truncated or no .* file: copy it again"):
            load_plain(str(path), "copy it again")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        load_plain(str(tmp_path / "gone.pth"), "copy it again")
