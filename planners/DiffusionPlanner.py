"""Plans residual-encoder networks for learning from every scan, labeled or not."""

from copy import deepcopy

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)

from nnunet_diffusion.preprocessing.fingerprint import with_unlabeled_geometry


class DiffusionPlanner(ResEncUNetPlanner):
    """nnU-Net's residual-encoder preset M, with the geometry of labeled and unlabeled scans together.

    Target spacing, median shape and with them patches follow all scans. Intensity statistics are nnU-Net's own: of the
    labeled foreground. Beside nnU-Net's configurations there is `2d_256`: slices scaled, aspect ratio kept, until the
    longer edge of the median slice is 256, in patches of 256 x 256. Everything not mentioned here is nnU-Net's.
    """

    uses_unlabeled_geometry = True
    data_name = "nnUNetDiffusionPlans"  # M, L and XL share preprocessed data: their plans agree on spacing
    default_plans_name = "nnUNetDiffusionPlans"
    memory_target_gb = 8  # this and the two below: nnU-Net 2.8.1, nnUNetPlannerResEncM
    feature_voxels_2d = 135000000
    feature_voxels_3d = 680000000
    settings = {}  # of our trainers, for the plans: {trainer: {setting: value}}

    def __init__(self, dataset_name_or_id, gpu_memory_target_in_gb=None, plans_name=None, **options):
        """Takes nnU-Net's own arguments, all but the first by keyword; None: the class's memory target and plans name.

        Raises:
            UserError: If the data set has unlabeled scans that were not measured.
        """
        options["gpu_memory_target_in_gb"] = gpu_memory_target_in_gb or self.memory_target_gb
        super().__init__(dataset_name_or_id, plans_name=plans_name or self.default_plans_name, **options)
        self.UNet_reference_val_corresp_GB = self.memory_target_gb
        self.UNet_reference_val_2d = self.feature_voxels_2d
        self.UNet_reference_val_3d = self.feature_voxels_3d
        self.max_dataset_covered = 1
        self.dataset_fingerprint = with_unlabeled_geometry(
            self.dataset_fingerprint, self.dataset_name, self.dataset_json
        )

    def generate_data_identifier(self, configuration_name):
        """Leaves `nnUNetPlans_...` to nnU-Net, whose spacing is that of the labeled cases alone."""
        shared = configuration_name in ("2d", "2d_256", "3d_fullres")
        return f"{self.data_name if shared else self.plans_identifier}_{configuration_name}"

    def save_plans(self, plans):
        """Saves the plans with `2d_256` and the block of settings that our trainers read."""
        plans["configurations"]["2d_256"] = self._plan_2d_256(plans)
        plans["nnunet_diffusion"] = deepcopy(self.settings)
        super().save_plans(plans)

    def _plan_2d_256(self, plans) -> dict:
        plan_2d = plans["configurations"]["2d"]
        scale = max(plan_2d["median_image_size_in_voxels"]) / 256
        num_slices = plans["original_median_shape_after_transp"][0] * self.dataset_json["numTraining"]
        plan = self.get_plans_for_configuration(
            np.array(plan_2d["spacing"]) * scale,
            (256, 256),
            self.generate_data_identifier("2d_256"),
            float(num_slices * 256**2),
            {},
        )
        plan["median_image_size_in_voxels"] = [round(i / scale) for i in plan_2d["median_image_size_in_voxels"]]
        plan["batch_dice"] = plan_2d["batch_dice"]
        return plan
