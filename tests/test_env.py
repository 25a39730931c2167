import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_diffusion import checkup, installation
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError

OURS = installation.trainers_folder()


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """A shell in which nothing of nnU-Net is set."""
    for name in (*installation.FOLDERS, installation.EXT_TRAINER, installation.WAIT_POLICY):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def shell(capfd, *argv: str) -> dict[str, str]:
    """What a POSIX shell's variables are after `eval` of the command's output."""
    assert main(["env", *argv]) == 0
    exports = capfd.readouterr().out
    done = subprocess.run(["sh", "-c", f'set -eu; eval "$1"; "{sys.executable}" -c "{DUMP}"', "sh", exports],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


DUMP = "import os; [print(k + '=' + v) for k, v in os.environ.items() if k.startswith(('nnUNet_', 'OMP_WAIT'))]"


def problems(findings) -> list[str]:
    return [finding.text for finding in findings if not finding.is_ok]


def test_exports_survive_eval_with_blanks_and_quotes(capfd, tmp_path):
    root = tmp_path / 'it\'s $HOME; "data"'
    values = shell(capfd, "--root", str(root))
    assert values["nnUNet_extTrainer"] == OURS
    for name in installation.FOLDERS:
        assert values[name] == str(root / name)
        assert (root / name).is_dir()


def test_user_folders_are_kept_and_ours_is_there_once(bare, capfd, tmp_path):
    bare.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), "", "/else where"]))
    assert shell(capfd)["nnUNet_extTrainer"] == os.pathsep.join([OURS, str(tmp_path), "/else where"])
    link = tmp_path / "link"
    link.symlink_to(OURS)
    bare.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(link)]))
    assert shell(capfd)["nnUNet_extTrainer"] == os.pathsep.join([str(tmp_path), str(link)])


@pytest.mark.parametrize(
    ("gpu", "users", "exported"), [(False, None, "passive"), (False, "ACTIVE", "ACTIVE"), (True, None, None)]
)
def test_threads_sleep_while_they_wait_where_there_is_no_gpu_unless_the_user_wants_otherwise(
    bare, capfd, gpu, users, exported
):
    bare.setattr(installation, "may_have_gpu", lambda: gpu)
    if users:
        bare.setenv("OMP_WAIT_POLICY", users)
    assert shell(capfd).get("OMP_WAIT_POLICY") == exported


def test_a_gpu_is_found_by_its_driver(bare, tmp_path):
    bare.setenv("PATH", str(tmp_path))
    bare.setattr(installation, "GPUS", (str(tmp_path / "nvidiactl"),))
    assert not installation.may_have_gpu()
    (tmp_path / "nvidiactl").touch()
    assert installation.may_have_gpu()
    (tmp_path / "nvidiactl").rename(tmp_path / "nvidia-smi")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert installation.may_have_gpu()


def test_check_says_how_threads_wait_only_where_there_is_no_gpu(bare):
    found = {"errors": {}, "cuda": "", "trainers": {}}
    assert "OMP_WAIT_POLICY is not set: threads spin" in problems(checkup.check_probe(found))[0]
    assert problems(checkup.check_probe({**found, "cuda": "Some GPU"})) == []
    for policy, said in (("passive", "threads sleep"), ("ACTIVE", "as you set it")):
        bare.setenv("OMP_WAIT_POLICY", policy)
        assert checkup.check_waiting().is_ok and said in checkup.check_waiting().text


def test_unset_folders_are_told_on_stderr_only(bare, capfd, tmp_path):
    bare.setenv("nnUNet_raw", str(tmp_path))
    assert main(["env"]) == 0
    out, err = capfd.readouterr()
    assert f"export nnUNet_raw={tmp_path}" in out
    assert "nnUNet_results" not in out
    assert "nnUNet_results is not set" in err


def test_commands_name_the_folders_that_they_miss(bare, capfd, tmp_path):
    bare.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(UserError, match="^nnUNet_preprocessed, nnUNet_results not set"):
        installation.require_folders()
    assert main("export --stock -d 1 -tr ConfiguredTrainer -c 2d".split()) == 1
    assert capfd.readouterr().err.startswith("nnunet_diffusion: error: nnUNet_results not set")


def test_check_folder(bare, tmp_path):
    assert "is not set" in checkup.check_folder("nnUNet_raw").text
    bare.setenv("nnUNet_raw", str(tmp_path / "none"))
    assert "is not a folder" in checkup.check_folder("nnUNet_raw").text
    bare.setenv("nnUNet_raw", str(tmp_path))
    assert checkup.check_folder("nnUNet_raw") == (True, f"nnUNet_raw={tmp_path}")
    bare.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert "cannot be written to" in checkup.check_folder("nnUNet_raw").text


def test_check_ext_trainer(bare, tmp_path):
    assert "lacks" in problems(checkup.check_ext_trainer())[0]
    bare.setenv("nnUNet_extTrainer", os.path.dirname(OURS))
    above, lacks = problems(checkup.check_ext_trainer())
    assert f"name {OURS}" in above
    assert "lacks" in lacks
    bare.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path / "gone"), OURS]))
    assert [text.split(",")[0] for text in problems(checkup.check_ext_trainer())] == [
        f"nnUNet_extTrainer names {tmp_path / 'gone'}"
    ]
    bare.setenv("nnUNet_extTrainer", OURS)
    assert problems(checkup.check_ext_trainer()) == []


def test_check_versions_names_package_bound_and_remedy(bare):
    assert problems(checkup.check_versions()) == []
    true_version = checkup.importlib.metadata.version
    bare.setattr(
        checkup.importlib.metadata, "version", lambda name: "2.7.0" if name == "nnunetv2" else true_version(name)
    )
    (problem,) = problems(checkup.check_versions())
    assert problem.startswith("nnunetv2 2.7.0: nnunet_diffusion needs <2.9,>=2.8.1: pip install ")


def test_broken_pair_is_named_with_its_remedy(bare, tmp_path):
    """As with a CPU-only torch beside the CUDA build of torchvision; the two stand-ins spare seconds of import."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    bare.setenv("PYTHONPATH", str(tmp_path))
    bare.setenv("OMP_WAIT_POLICY", "passive")
    (problem,) = problems(checkup.check_probe(checkup.probe()))
    assert "import torchvision fails (RuntimeError: operator torchvision::nms does not exist)" in problem
    assert "from the same place" in problem


def test_dying_process_is_a_problem(bare, tmp_path):
    (tmp_path / "torch.py").write_text("import os; os._exit(3)")
    bare.setenv("PYTHONPATH", str(tmp_path))
    (problem,) = problems(checkup.check_probe(checkup.probe()))
    assert "import torch fails (exit code 3" in problem


def test_check_probe_names_the_trainers_that_nnunet_does_not_find():
    found = {"errors": {}, "cuda": "Some GPU", "trainers": {"A": OURS, "B": "/theirs", "C": "SyntaxError: bad"}}
    assert problems(checkup.check_probe(found)) == [
        "nnU-Net does not find our B: /theirs",
        "nnU-Net does not find our C: SyntaxError: bad",
    ]


def test_whole_check_is_clean_where_everything_is_set(bare, nnunet_folders, probe, capfd):
    bare.setenv("nnUNet_extTrainer", OURS)
    bare.setenv("OMP_WAIT_POLICY", "passive")
    bare.setattr(checkup, "probe", lambda: probe)
    assert main(["env", "--check"]) == 0, capfd.readouterr().out
    assert capfd.readouterr().out.endswith("0 problems\n")
    bare.delenv("nnUNet_results")
    assert main(["env", "--check"]) == 1
    out = capfd.readouterr().out
    assert "PROBLEM  nnUNet_results is not set" in out
    assert out.endswith("1 problem\n")


@pytest.mark.slow
def test_trainer_of_the_same_name_in_an_earlier_folder_is_found_out(bare, tmp_path):
    (tmp_path / "Theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        f"class {installation.trainer_names()[0]}(nnUNetTrainer):\n    pass\n"
    )
    bare.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), OURS]))
    bare.setenv("OMP_WAIT_POLICY", "passive")
    assert problems(checkup.check_probe(checkup.probe())) == [
        f"nnU-Net does not find our {installation.trainer_names()[0]}: {Path(tmp_path)}"
    ]
