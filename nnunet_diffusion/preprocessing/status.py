"""How far the preprocessing of a data set is."""

from glob import escape, glob
from os.path import join

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.files import read_json
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.preprocessing.cases import labeled_files, pool_folder, unlabeled_cases
from nnunet_diffusion.preprocessing.preprocess import FAILED_FILES
from nnunet_diffusion.progress import Progress, progress
from nnunet_diffusion.records import read_lines
from nnunet_diffusion.schemas import Dataset


def status(dataset_name: str, plans_manager: PlansManager, configurations: list[str]) -> list[Progress]:
    """Looks at how far the labeled cases and the pool of each configuration are.

    Raises:
        UserError: If dataset.json is not sound.
    """
    raw = join(nnUNet_raw, dataset_name)
    dataset_json = read_json(join(raw, "dataset.json"), Dataset)
    labeled, unlabeled = labeled_files(raw, dataset_json), unlabeled_cases(raw, dataset_json)
    found, base = [], join(nnUNet_preprocessed, dataset_name)
    for configuration in configurations:
        identifier = plans_manager.get_configuration(configuration).data_identifier
        folders = [(labeled, join(base, identifier)), (unlabeled, pool_folder(base, identifier))]
        for what, (cases, folder) in zip(("labeled cases", "pool"), folders, strict=True):
            found.append(progress(f"{configuration}, {what}", cases, folder, ".b2nd", failed_in(folder)))
    return found


def failed_in(folder: str) -> dict[str, str]:
    """Reads which cases a command, or parts of one, could not preprocess into a folder, and why."""
    files = glob(join(escape(folder), WORK, FAILED_FILES))
    return {case: why for file in sorted(files) for case, why in read_lines(file)[0][1:]}
