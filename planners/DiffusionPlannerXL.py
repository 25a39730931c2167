"""Plans residual-encoder networks for 40 GB of GPU memory."""

from nnunet_diffusion.planners.DiffusionPlanner import DiffusionPlanner


class DiffusionPlannerXL(DiffusionPlanner):
    """`DiffusionPlanner` with the memory target of nnU-Net's residual-encoder preset XL."""

    default_plans_name = "nnUNetDiffusionXLPlans"
    memory_target_gb = 40  # this and the two below: nnU-Net 2.8.1, nnUNetPlannerResEncXL
    feature_voxels_2d = 560000000
    feature_voxels_3d = 3600000000
