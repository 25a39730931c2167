"""`nnunet_diffusion train`: under torchrun, two processes on a CPU train what one trains on the joint batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import minimal
import pytest
import tiny
import torch
from running import PYTHON, run_command

from nnunet_diffusion.cli import main
from nnunet_diffusion.installation import trainers_folder
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser

# What each process does: nnU-Net's own steps on its half of three fixed batches; without torchrun, on the whole ones.
PROGRAM = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import tiny, torch
from torch import distributed
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer

size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
if size > 1:
    distributed.init_process_group("gloo")
for plans in ("DiceFalse", "DiceTrue"):
    trainer = tiny.trainer(PartialLabelTrainer, plans=plans)
    trainer.initialize()
    trainer.network.train()
    assert (type(trainer.network).__name__ == "DistributedDataParallel") == (size > 1), type(trainer.network)
    assert trainer.batch_size == 2 // size and trainer.is_ddp == (size > 1) and trainer.grad_scaler is None
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        data = torch.randn(2, 1, 16, 16, generator=generator)
        target = torch.randint(0, 4, (2, 1, 16, 16), generator=generator)
        mine = slice(rank, rank + 1) if size > 1 else slice(0, 2)
        scales = range(len(trainer._get_deep_supervision_scales()))
        targets = [target[mine, :, :: 2**s, :: 2**s] for s in scales]
        trainer.train_step({"data": data[mine], "target": targets, "keys": ["tiny_000", "tiny_001"][mine]})
    if rank == 0:
        weights = getattr(trainer.network, "module", trainer.network).state_dict()
        torch.save(weights, sys.argv[1] + plans)
if size > 1:
    distributed.destroy_process_group()
"""

# What each process learned of the images before the first step, where the batch of 3 does not divide.
DENOISING = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import json, tiny
from pathlib import Path
from torch import distributed
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer

distributed.init_process_group("gloo")
trainer = tiny.trainer(DenoisingDiffusionTrainer, plans="Three")
trainer.initialize()
trainer.get_dataloaders()
buffers = {name: value.tolist() for name, value in unwrap(trainer.network).named_buffers()}
told = {"batch": trainer.batch_size, "process": trainer.diffusion.description, "buffers": buffers}
Path(sys.argv[1], f"{distributed.get_rank()}.json").write_text(json.dumps(told))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set, with plans for both kinds of Dice."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        folder = tiny.prepare()
        plans = json.loads((folder / f"{tiny.PLANS}.json").read_text())
        for batch_dice in (False, True):
            plans["configurations"]["2d"]["batch_dice"] = batch_dice
            # plain SGD steps of this size tell gradients that differ; AdamW would take the sign of rounding errors
            pool = {"start": "scratch", "supervised_share": 0.0, "least_dice": 0.0}  # from the first epoch on
            block = {"PartialLabelTrainer": {"seed": 1, "initial_lr": 0.1}, "MeanTeacherTrainer": pool}
            tiny.write_plans(plans, f"Dice{batch_dice}", **block)
        yield folder


def torchrun(python, number, *command):
    """Runs a command in so many processes of a Python on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(number)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port), *command]
    environment = os.environ | {"TESTS": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    return run_command(launcher, env=environment)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(world, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"TESTS": os.path.dirname(__file__)}
    run_command([sys.executable, str(program), str(tmp_path / "one")], env=environment).check_returncode()
    done = torchrun(sys.executable, 2, str(program), str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    for plans in ("DiceFalse", "DiceTrue"):
        one, two = (torch.load(tmp_path / f"{name}{plans}", weights_only=True) for name in ("one", "two"))
        for name, weight in one.items():
            assert torch.allclose(weight, two[name], rtol=1e-4, atol=1e-5), (plans, name)


@pytest.mark.slow
def test_processes_with_batches_of_their_own_share_one_diffusion(world, tmp_path):
    plans = json.loads((world / f"{tiny.PLANS}.json").read_text())
    plans["configurations"]["2d"]["batch_size"] = 3
    tiny.write_plans(plans, "Three")
    program = tmp_path / "program.py"
    program.write_text(DENOISING)
    done = torchrun(sys.executable, 2, str(program), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("batch"), second.pop("batch")) == (2, 1)
    assert first == second and first["process"]["prior"] != [[0.0], [1.0]]


@pytest.mark.slow
def test_the_command_trains_and_validates_under_torchrun(world):
    program = "import sys; from nnunet_diffusion.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.path.join(os.environ["nnUNet_results"], "command.py")
    with open(path, "w") as f:
        f.write(f'if __name__ == "__main__":\n    {program}\n')
    arguments = ["train", str(tiny.ID), "2d", "0", "-tr", "MeanTeacherTrainer", "-p", "DiceTrue", "-device", "cpu"]
    done = torchrun(PYTHON, 2, path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    fold = os.path.join(os.environ["nnUNet_results"], tiny.NAME, "MeanTeacherTrainer__DiceTrue__2d", "fold_0")
    assert "Pool: loss" in next(Path(fold).glob("training_log*")).read_text()
    for name in ("checkpoint_final.pth", "validation/tiny_003.nii.gz", "validation/summary.json"):
        assert os.path.isfile(os.path.join(fold, name)), name


def command(name, *arguments):
    """A command of this installation."""
    return [str(Path(sys.executable).parent / name), *map(str, arguments)]


@pytest.mark.slow
def test_a_wrong_setting_is_the_last_line_and_leaves_no_results(world, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    tiny.write_plans(
        json.loads((world / f"{tiny.PLANS}.json").read_text()), "Wrong",
        DenoisingDiffusionTrainer={"schedule": "quadratic"},
    )  # fmt: skip
    results = Path(os.environ["nnUNet_results"])
    before = sorted(results.rglob("*"))
    arguments = (tiny.ID, "2d", 0, "-tr", "DenoisingDiffusionTrainer", "-p", "Wrong", "-device", "cpu")
    message = (
        "plans.json: nnunet_diffusion.DenoisingDiffusionTrainer.schedule is 'quadratic': "
        "it must be linear or cosine or sigmoid"
    )
    ours, nnunet = (
        run_command(command(*name, *arguments)) for name in (("nnunet_diffusion", "train"), ("nnUNetv2_train",))
    )
    assert (ours.returncode, ours.stderr.splitlines()[-1]) == (1, f"nnunet_diffusion: error: {message}")
    assert "Traceback" not in ours.stderr
    assert nnunet.returncode != 0 and nnunet.stderr.splitlines()[-1].endswith(f"UserError: {message}")
    assert sorted(results.rglob("*")) == before


@pytest.mark.slow
def test_a_killed_pretraining_continues_as_if_nothing_had_happened(world, monkeypatch):
    """nnUNetv2_train, killed after its first checkpoint, then --c: the denoiser of the uninterrupted command."""
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    plans, files = json.loads((world / f"{tiny.PLANS}.json").read_text()), {}
    for name in ("Whole", "Killed"):
        tiny.write_plans(plans, name, DenoisingDiffusionTrainer={"num_epochs": 4, "save_every": 1, "seed": 7})
        folder = Path(os.environ["nnUNet_results"], tiny.NAME, f"DenoisingDiffusionTrainer__{name}__2d", "fold_0")
        files[name] = folder / "denoiser.pth"
    arguments = (tiny.ID, "2d", 0, "-tr", "DenoisingDiffusionTrainer", "-device", "cpu", "-p")
    run_command(command("nnUNetv2_train", *arguments, "Whole")).check_returncode()

    checkpoint, quiet = files["Killed"].with_name("checkpoint_latest.pth"), {"stdout": subprocess.DEVNULL}
    killable = [PYTHON, Path(PYTHON).with_name("nnUNetv2_train"), *map(str, arguments), "Killed"]
    with subprocess.Popen(killable, **quiet) as process:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not files["Killed"].exists(), "it ended before it was killed"
    epoch = torch.load(checkpoint, map_location="cpu", weights_only=False)["current_epoch"]
    continued = run_command(command("nnUNetv2_train", *arguments, "Killed", "--c"))
    assert continued.returncode == 0, continued.stderr[-3000:]
    assert f"Epoch {epoch}" in continued.stdout and f"Epoch {epoch - 1}" not in continued.stdout

    whole, killed = (load_denoiser(str(files[name])) for name in ("Whole", "Killed"))
    torch.testing.assert_close(killed["denoiser_weights"], whole["denoiser_weights"], rtol=1e-5, atol=1e-6)
    losses = [content["training"]["held_out_loss"] for content in (killed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


MINIMAL = ["8", "2d", "0", "-device", "cpu", "-p", "nnUNetCompactPlans"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["1", "2d", "x"], {}, "fold x"),
        (["1", "2d", "0", "--c", "--val"], {}, "--c and --val"),
        (["1", "2d", "0", "--val_best", "--disable_checkpointing"], {}, "--val_best"),
        (["1", "2d", "0", "-num_gpus", "2"], {"WORLD_SIZE": "2"}, "torchrun decides"),
        (["1", "2d", "0", "-device", "cpu", "-num_gpus", "2"], {}, "-num_gpus 2: only with -device cuda"),
        (["1", "2d", "0", "-device", "cpu", "--c", "-pretrained_weights", "x"], {}, "--c and -pretrained_weights"),
        (["1", "2d", "0", "-device", "cpu"], {}, "error: data set '1': "),
        (["8", "2d", "0", "-device", "cpu"], {}, "give -p nnUNetCompactPlans or nnUNetDiffusionPlans"),
        (["8", "4d", "0", "-device", "cpu", "-p", "nnUNetCompactPlans"], {}, "nnUNetCompactPlans.json has 2d, 3d"),
        (["8", "2d", "0", "-device", "cpu", "-p", "nnUNetDiffusionPlans"], {}, "nnUNetDiffusionPlans.json: is no JSON"),
        (["8", "2d", "0", "-device", "cpu", "-p", "Mine"], {}, "Mine.json: the whole file: Input should be"),
        (["8", "2d", "0", "-device", "cpu", "-p", "Moved"], {}, "Moved.json: dataset_name: is 'Dataset009_Other', not"),
        ([*MINIMAL, "-tr", "Nope"], {}, "-tr Nope: there is no such trainer: give ConfiguredTrainer, Denoising"),
        ([*MINIMAL, "-pretrained_weights", "no.pth"], {}, "No such file or directory: 'no.pth'"),
        ([*MINIMAL, "-pretrained_weights", __file__], {}, "test_train.py cannot be read, it is truncated"),
    ],
)
def test_wrong_arguments_are_named(arguments, environment, message, nnunet_folders, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_extTrainer", "")  # restored afterwards
    folder = nnunet_folders / "nnUNet_preprocessed" / "Dataset008_Minimal"
    folder.mkdir()
    (folder / "nnUNetCompactPlans.json").write_text(json.dumps(minimal.plans("2d", "3d")))
    (folder / "nnUNetDiffusionPlans.json").write_text("{,}")
    (folder / "dataset.json").write_text(json.dumps(minimal.dataset_json()))
    (folder / "Mine.json").write_text("[1]")
    (folder / "Moved.json").write_text(json.dumps({**minimal.plans("2d"), "dataset_name": "Dataset009_Other"}))
    assert main(["train", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "command",
    [["train", "1", "2d", "0"], ["mutual", "-d", "1", "-c", "2d", "-f", "0"], ["demo", "--device", "cuda"]],
)
def test_a_gpu_that_is_not_there_is_named(command, nnunet_folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("nnUNet_extTrainer", "")
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert "device cuda: cannot be used here (torch finds no GPU): try cpu" in capsys.readouterr().err
