"""What we rely on in nnU-Net beyond its public names: when a new version changes one of these, it fails here first."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from nnunet_diffusion import trainers

ROOT = Path(__file__).resolve().parent.parent
PLUG_INS = ("trainers", "planners", "dataset_conversion")
SOURCES = [*(ROOT / "nnunet_diffusion").rglob("*.py"), *(f for name in PLUG_INS for f in (ROOT / name).glob("*.py"))]
TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer"
PLANNERS = "nnunetv2.experiment_planning.experiment_planners"

# Names with an underscore that we use, by what they belong to.
PRIVATE = {
    TRAINER: {
        "_build_loss", "_do_i_compile", "_get_deep_supervision_scales", "_set_batch_size_and_oversample",
    },
    "nnunetv2.preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor": {"_sample_foreground_locations"},
    "batchgenerators.dataloading.nondet_multi_threaded_augmenter.NonDetMultiThreadedAugmenter": {"_finish"},
    "torch.nn.Module": {"_modules"},
    "torch.nn.modules.batchnorm": {"_BatchNorm", "_NormBase"},
    "torch.nn.modules.conv": {"_ConvNd"},
    "torch.nn.modules.instancenorm": {"_InstanceNorm"},
    "torch._dynamo.OptimizedModule": {"_orig_mod"},
}  # fmt: skip
NO_HOST = {"_asdict", "_fields", "_replace", "_exit"}  # Python's own

# What our classes override, with the parameters that nnU-Net calls it with.
OVERRIDDEN = {
    "batchgeneratorsv2.transforms.base.basic_transform.BasicTransform": {
        "__init__": "self",
        "_apply_to_image": "self, img, params",
    },
    "batchgenerators.dataloading.data_loader.DataLoader": {
        "__init__": (
            "self, data, batch_size, num_threads_in_multithreaded, seed_for_shuffle, return_incomplete, "
            "shuffle, infinite, sampling_probabilities"
        ),
        "get_indices": "self",
    },
    "batchgenerators.dataloading.data_loader.SlimDataLoaderBase": {
        "__init__": "self, data, batch_size, number_of_threads_in_multithreaded",
    },
    f"{PLANNERS}.default_experiment_planner.ExperimentPlanner": {
        "__init__": (
            "self, dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, "
            "overwrite_target_spacing, suppress_transpose"
        ),
        "generate_data_identifier": "self, configuration_name",
        "get_plans_for_configuration": (
            "self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache"
        ),
        "save_plans": "self, plans",
    },
    f"{PLANNERS}.residual_unets.residual_encoder_unet_planners.ResEncUNetPlanner": {
        "__init__": (
            "self, dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, "
            "overwrite_target_spacing, suppress_transpose"
        ),
        "generate_data_identifier": "self, configuration_name",
    },
    "nnunetv2.training.dataloading.data_loader.nnUNetDataLoader": {
        "__init__": (
            "self, data, batch_size, patch_size, final_patch_size, label_manager, "
            "oversample_foreground_percent, sampling_probabilities, pad_sides, probabilistic_oversampling, "
            "transforms"
        ),
    },
    "nnunetv2.training.dataloading.nnunet_dataset.nnUNetBaseDataset": {
        "__init__": "self, folder, identifiers, folder_with_segs_from_previous_stage",
        "get_identifiers": "folder",
        "load_case": "self, identifier",
        "save_case": "data, seg, properties, output_filename_truncated",
    },
    TRAINER: {
        "__init__": "self, plans, configuration, fold, dataset_json, device",
        "_build_loss": "self",
        "_set_batch_size_and_oversample": "self",
        "build_network_architecture": (
            "plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision"
        ),
        "configure_optimizers": "self",
        "configure_rotation_dummyDA_mirroring_and_inital_patch_size": "self",
        "do_split": "self",
        "get_dataloaders": "self",
        "get_tr_and_val_datasets": "self",
        "initialize": "self",
        "load_checkpoint": "self, filename_or_checkpoint",
        "on_epoch_end": "self",
        "on_train_end": "self",
        "on_train_epoch_end": "self, train_outputs",
        "on_train_epoch_start": "self",
        "on_train_start": "self",
        "on_validation_epoch_end": "self, val_outputs",
        "on_validation_epoch_start": "self",
        "perform_actual_validation": "self, save_probabilities",
        "run_training": "self",
        "save_checkpoint": "self, filename",
        "set_deep_supervision_enabled": "self, enabled",
        "train_step": "self, batch",
        "validation_step": "self, batch",
    },
    "nnunetv2.utilities.label_handling.label_handling.LabelManager": {
        "__init__": "self, label_dict, regions_class_order, force_use_labels, inference_nonlin",
    },
}
# Functions of nnU-Net that we replace for a while.
PATCHED = {"nnunetv2.utilities.find_objects.recursive_find_python_class"}


def resolve(name: str):
    """A module, or what is in one."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            continue
        for part in parts[number:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def private_names() -> set[str]:
    """Names with an underscore that our sources use and do not define themselves."""
    used, own = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and path.parent.name not in PLUG_INS:
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"}
    own |= {node.name for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_plan")}  # fmt: skip
    return used - own - NO_HOST


def test_private_names_are_known_and_there():
    assert private_names() == {name for names in PRIVATE.values() for name in names}
    for owner, names in PRIVATE.items():
        found = resolve(owner)
        source = inspect.getsource(found)
        assert [name for name in names if not hasattr(found, name) and name not in source] == [], owner


def overridden() -> dict[str, dict[str, str]]:
    """{host class: {what one of our classes defines anew: its parameters there}}."""
    found = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            cls = getattr(module_of(path), node.name) if isinstance(node, ast.ClassDef) else object
            for host in cls.__mro__[1:]:
                if host.__module__.split(".")[0] in ("nnunetv2", "batchgenerators", "batchgeneratorsv2"):
                    for member in sorted(set(vars(cls)) & set(vars(host))):
                        if callable(getattr(host, member)) and (member[:2] != "__" or member == "__init__"):
                            parameters = ", ".join(inspect.signature(getattr(host, member)).parameters)
                            found.setdefault(f"{host.__module__}.{host.__qualname__}", {})[member] = parameters
    return found


def module_of(path: Path):
    """The module of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "nnunet_diffusion" else ("nnunet_diffusion", *parts)
    return importlib.import_module(".".join(part for part in parts if part != "__init__"))


def test_what_we_override_is_there_with_the_same_parameters():
    assert overridden() == OVERRIDDEN


def test_what_we_replace_is_known():
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        hosts = {alias.asname or alias.name.split(".")[-1]: f"{node.module}.{alias.name}" for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("nnunetv2", "torch")
                 for alias in node.names}  # fmt: skip
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") in hosts:
                    found.add(f"{hosts[target.value.id]}.{target.attr}")
    assert found == PATCHED
    for name in PATCHED:
        assert callable(resolve(name)), name


@pytest.mark.parametrize("cls", trainers.our_trainers(), ids=lambda cls: cls.__name__)
def test_nnunet_builds_our_trainers_with_its_own_arguments(cls):
    """It hands over exactly these, and saves them by these names."""
    assert list(inspect.signature(cls.__init__).parameters) == [
        "self", "plans", "configuration", "fold", "dataset_json", "device",
    ]  # fmt: skip
