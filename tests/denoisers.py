"""Denoiser files of tiny random networks: what the tests draw from."""

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_diffusion.pretraining.conditioning import condition
from nnunet_diffusion.pretraining.denoiser_file import save_denoiser

NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
CT = {"mean": 40.0, "std": 200.0, "percentile_00_5": -960.0, "percentile_99_5": 1040.0}


def plan(dim=2, channels=1, scheme="CTNormalization", transpose=(1, 0, 2)):
    """An identity as `plan_identity` writes it."""
    return {
        "dataset_name": "Dataset990_Tiny", "plans_name": "nnUNetTinyPlans",
        "configuration": "2d" if dim == 2 else "3d_fullres",
        "spacing": [2.0, 3.0, 4.0][3 - dim :], "patch_size": [8, 12, 16][3 - dim :],
        "transpose_forward": list(transpose),
        "normalization_schemes": [scheme] * channels, "intensities": {str(i): CT for i in range(channels)},
        "channel_names": {str(i): "CT" for i in range(channels)}, "network_class": NETWORK,
        "network_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * 3, "strides": [[1] * dim, [2] * dim, [2] * dim], 
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d", "norm_op_kwargs": {"affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
        },
        "network_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip


def write(path, identity=None, timesteps=20, image_range=(-5.0, 5.0)):
    """Saves a denoiser that has learned nothing; returns its path as text."""
    identity = identity or plan()
    channels = len(identity["channel_names"])
    network = get_network_from_plans(
        identity["network_class"], identity["network_kwargs"], identity["network_kwargs_requiring_import"],
        channels, channels, deep_supervision=False,
    )  # fmt: skip
    denoiser = condition(network, channels)
    denoiser.image_range.copy_(torch.tensor(image_range))
    process = {"schedule": "linear", "timesteps": timesteps, "prediction": "epsilon"}
    save_denoiser(str(path), denoiser, timesteps // 2, process, identity, {"batch_size": 4})
    return str(path)
