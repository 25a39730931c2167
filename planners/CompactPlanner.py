"""Plans small networks on small patches: for laptops, CPU and tests."""

from copy import deepcopy

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

SHORT_TRAINING = {"num_epochs": 60, "num_iterations_per_epoch": 50, "num_val_iterations_per_epoch": 8}
# In so few steps nnU-Net's SGD leaves small organs empty (docs/label_efficiency.md).
FINE_TUNING = {"optimizer_name": "AdamW", "initial_lr": 3e-3, "head_lr_factor": 3.0, "warmup_epochs": 1}


class CompactPlanner(ExperimentPlanner):
    """nnU-Net's plan with a network that one CPU thread can train: 0.2 s a 2-D step, 1 s a 3-D step.

    Spacing, normalization and topology rules are nnU-Net's own. Width, depth, patch and batch are capped, a
    low-resolution configuration is never planned, and the plans block `nnunet_diffusion` shortens every training.
    """

    max_patch_size = {2: (96, 96), 3: (48, 64, 64)}  # voxels, in the plan's axis order: the coarsest axis comes first
    max_batch_size = {2: 8, 3: 2}
    settings = {  # of a class and of those that derive from it
        "ConfiguredTrainer": SHORT_TRAINING,
        "PartialLabelTrainer": FINE_TUNING,
        "DenoisingDiffusionTrainer": {"num_val_iterations_per_epoch": 8, "initial_lr": 3e-3, "warmup_epochs": 2},
        "DiffusionTeacherTrainer": {"initial_lr": 1e-3},
    }

    def __init__(self, dataset_name_or_id, plans_name="nnUNetCompactPlans", **options):
        """Takes nnU-Net's own arguments, all but the first by keyword."""
        super().__init__(dataset_name_or_id, plans_name=plans_name, **options)
        self.UNet_base_num_features = 16
        self.UNet_max_features_2d = self.UNet_max_features_3d = 128
        self.UNet_blocks_per_stage_encoder = (1,) * 14
        self.UNet_blocks_per_stage_decoder = (1,) * 13
        self.max_dataset_covered = 1  # the batch is capped below; small data sets still get a full one
        self.lowres_creation_threshold = 0

    def get_plans_for_configuration(self, spacing, median_shape, *args, **kwargs):
        """Plans as nnU-Net, for images that are no larger than the largest patch allowed; arguments as nnU-Net's."""
        dimensions = len(spacing)
        capped = [min(size, cap) for size, cap in zip(median_shape, self.max_patch_size[dimensions], strict=False)]
        plan = super().get_plans_for_configuration(spacing, capped, *args, **kwargs)
        plan["median_image_size_in_voxels"] = median_shape
        plan["batch_size"] = min(plan["batch_size"], self.max_batch_size[dimensions])
        return plan

    def save_plans(self, plans):
        """Saves the plans with the block of settings that our trainers read."""
        plans["nnunet_diffusion"] = deepcopy(self.settings)
        super().save_plans(plans)
