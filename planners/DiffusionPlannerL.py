"""Plans residual-encoder networks for 24 GB of GPU memory."""

from nnunet_diffusion.planners.DiffusionPlanner import DiffusionPlanner


class DiffusionPlannerL(DiffusionPlanner):
    """`DiffusionPlanner` with the memory target of nnU-Net's residual-encoder preset L."""

    default_plans_name = "nnUNetDiffusionLPlans"
    memory_target_gb = 24  # this and the two below: nnU-Net 2.8.1, nnUNetPlannerResEncL
    feature_voxels_2d = 380000000
    feature_voxels_3d = 2100000000
