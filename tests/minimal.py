"""The least that dataset.json and plans.json must hold to be read."""


def plans(*configurations: str, name: str = "nnUNetPlans") -> dict:
    """Plans of which every configuration is 2-D with an identifier of its own."""
    return {
        "dataset_name": "Dataset008_Minimal",
        "plans_name": name,
        "configurations": {
            configuration: {
                "data_identifier": f"{name}_{configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing": [1.0, 1.0],
                "patch_size": [8, 8],
                "batch_size": 2,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "architecture": {},
            }
            for configuration in configurations
        },
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
    }


def dataset_json() -> dict:
    """A data set of one channel and one label."""
    return {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
