"""The benchmarks run from end to end, in miniature, on small made-up scans; what they find there means nothing."""

import json
import os
import sys
from pathlib import Path

import pytest
from running import run_command
from test_docs import ROOT
from test_docs_run import write_scans

pytestmark = pytest.mark.slow
ORGANS = ["Brainstem", "SpinalCord", "Mandible"]
PLANS = "nnUNetCompactPlans"
COMMON = f"-d 501 -c 2d -p {PLANS} --device cpu"
SHORT = "--seeds 0 --num_epochs 1 --num_iterations_per_epoch 1 --test_cases 2 -o out"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set of eight cases and two scans without labels, planned, and a denoiser."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_scans(root / "images", "kbp", range(1, 9), 3, root / "labels")
    write_scans(root / "more", "kbp", range(9, 11), 3)
    ours = f"{Path(sys.executable).parent / 'nnunet_diffusion'}"
    convert = f"convert folder images labels --unlabeled more -d 501 -n Heads --labels {' '.join(ORGANS)}"
    run(root, f"{ours} {convert}")
    run(root, f"{ours} plan_and_preprocess -d 501 -pl CompactPlanner -c 2d -np 1")
    path = next(root.glob(f"nnUNet_preprocessed/*/{PLANS}.json"))
    plans = json.loads(path.read_text())
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    short = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}
    plans["nnunet_diffusion"]["DenoisingDiffusionTrainer"] |= {**short, "warmup_epochs": 0}
    path.write_text(json.dumps(plans))
    benchmark(root, f"label_efficiency.py {COMMON} {SHORT} --make_split")
    run(root, f"{ours} train 501 2d 0 -tr DenoisingDiffusionTrainer -p {PLANS} -device cpu")
    return root


def run(folder: Path, command: str) -> str:
    """Runs a command; the test fails with what it said, if it fails."""
    environment = {**os.environ, "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}
    environment |= {f"nnUNet_{kind}": str(folder / f"nnUNet_{kind}") for kind in ("raw", "preprocessed", "results")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = run_command(command.split(), cwd=folder, env=environment)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def benchmark(folder: Path, command: str) -> str:
    return run(folder, f"{sys.executable} {ROOT / 'benchmarks'}/{command}")


def arms_of(file: Path) -> set[str]:
    return {group["arm"] for group in json.loads(file.read_text())["summary"]}


def test_label_efficiency_and_nothing_is_run_twice(home):
    command = f"label_efficiency.py {COMMON} {SHORT} --budgets 2 --arms scratch linear"
    benchmark(home, command)
    assert arms_of(home / "out" / "label_efficiency.json") == {"scratch", "linear"}
    assert (home / "out" / "label_efficiency.png").exists()
    assert "0 to do" in benchmark(home, command)


def test_partial_labels(home):
    benchmark(home, f"partial_labels.py {COMMON} {SHORT} --complete 1 --arms naive balanced_ramp")
    assert arms_of(home / "out" / "partial_labels.json") == {"naive", "balanced_ramp"}


def test_label_efficiency_with_a_pool(home):
    short = SHORT.replace("-o out", "-o pool")
    benchmark(home, f"label_efficiency.py {COMMON} {short} --budgets 2 --arms scratch mean_teacher co_training_gate "
              "--no_teacher")  # fmt: skip
    assert arms_of(home / "pool" / "label_efficiency.json") == {"scratch", "mean_teacher", "co_training_gate"}


def test_mutual(home):
    groups = "--groups Brainstem,SpinalCord Mandible --budget 4 --gate is_open=true"
    arms = "--stage_1 none pd+fd --stage_2 ps+dfs --beside partial"
    benchmark(home, f"mutual.py {COMMON} {SHORT} {groups} {arms}")
    assert arms_of(home / "out" / "mutual_stage1.json") == {"none", "pd+fd"}
    assert arms_of(home / "out" / "mutual_stage2.json") == {"ps+dfs, one member", "ps+dfs", "partial"}


def test_rounds(home):
    short = "--seeds 0 --annotated 2 --rounds 1 --num_epochs 1 --num_iterations_per_epoch 1 -o rounds"
    benchmark(home, f"rounds.py {COMMON} {short} --gate is_open=true --by_hand")
    result = json.loads((home / "rounds" / "rounds.json").read_text())[0]
    assert len(result["gated"]) == len(result["ungated"]) == 2
    assert min(result["seconds_outside_training"]["by_hand_parts"].values()) > 0
    assert (home / "rounds" / "rounds.png").exists()


def test_costs(home):
    """Speed and memory, of training with and without a pool, of the partial loss and of mutual learning."""
    benchmark(home, f"speed.py {COMMON} --rounds 2 --cases 1 -o speed.json")
    speed = json.loads((home / "speed.json").read_text())
    assert len(speed["ratios"]) == 5 and all(row["ratio"] > 0 for row in speed["ratios"])
    assert {m["what"].split(",")[0] for m in speed["memory"]} >= {"stock step", "prediction", "preprocessing"}
    benchmark(home, f"speed.py {COMMON} --rounds 2 --pool -o pool.json")
    assert len(json.loads((home / "pool.json").read_text())["ratios"]) == 4
    loss = json.loads(benchmark(home, "partial_loss.py --patch 8 --classes 3 --rounds 2"))
    assert loss["measured"][0]["time_ratio"] > 0
    plans = next(home.glob(f"nnUNet_preprocessed/*/{PLANS}.json"))
    table = benchmark(home, f"mutual_memory.py {plans} -c 2d --members 2")
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["plain", "checkpointing", "alternate"]


def test_scale(tmp_path):
    benchmark(tmp_path, "scale.py work --scans 5 -o scale.json")
    found = json.loads((tmp_path / "scale.json").read_text())["here"]["5"]
    assert found["files"]["most_in_a_folder"] == 12, "three files of each of four labeled cases"
    assert all(found[stage]["seconds"] > 0 for stage in ("pool", "predict", "filter and report"))


def test_feature_probe(home):
    denoiser = next(home.glob(f"nnUNet_results/*/DenoisingDiffusionTrainer__{PLANS}__2d/fold_0/denoiser.pth"))
    benchmark(home, f"feature_probe.py 501 2d {PLANS} {denoiser} --timesteps 0 300 --cases 2 --batches 2 -o probe.json")
    assert json.loads((home / "probe.json").read_text())
