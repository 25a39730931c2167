"""Mutual learning end to end in nnU-Net's own loop, on a tiny data set of which each case annotates some labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from nnunet_diffusion.trainers.MutualDifferenceTrainer import MutualDifferenceTrainer

pytestmark = pytest.mark.slow

GROUPS = [["left ball", "right ball"], ["box"]]
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2, "seed": 0}
AT_ONCE = {**SHORT, "supervised_share": 0.0, "ramp_share": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set; cases 0, 2 and 3 annotate the balls, 1 and 4 the box."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            folder = tmp_path_factory.mktemp(name)
            patch.setenv(name, str(folder))
        folder = tiny.prepare()
        keep_annotated(folder, {f"tiny_00{i}": GROUPS[group] for i, group in enumerate((0, 1, 0, 0, 1))})
        yield folder


def keep_annotated(folder, annotated):
    """Erases the other labels from the preprocessed cases, as if nobody had looked for them, and says so."""
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotated_labels": annotated}))


def trainer_of(world, cls, configuration="2d", plans="Mutual", **settings):
    content = json.loads((world / f"{tiny.PLANS}.json").read_text())
    tiny.write_plans(content, plans, **{cls.__name__: {**AT_ONCE, **settings}})
    return tiny.trainer(cls, configuration, plans=plans)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_stage_1(world, configuration):
    trainer = trainer_of(world, MutualDifferenceTrainer, configuration)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    print(Path(trainer.log_file).read_text()[-3000:])
