"""One run of rounds: what was asked for, where everything lies, and what was done before."""

import glob
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.gate import GateSettings, Verdict
from nnunet_diffusion.rounds.pseudo_labels import pseudo_folder
from nnunet_diffusion.rounds.state import (
    FORMAT,
    digest,
    load_state,
    record,
    refuse_changed_cases,
    refuse_changes,
    save_state,
)

TRAINER = "PseudoLabelTrainer"
CHECKPOINT = "checkpoint_final.pth"
HOUR_S, DAY_S = 3600, 86400


@dataclass(frozen=True)
class Request:
    """What is asked for; see the command's help."""

    dataset: str  # DatasetXXX_Name
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str = "DiffusionPretrainedTrainer"
    model: str = ""  # a model folder in the place of a first training
    start: str = "denoiser"
    finetune: bool = False
    gate: GateSettings = GateSettings()
    tolerance: float = 0.01  # of the agreement: by how much it may be below the best so far
    device: str = "cuda"
    num_gpus: int = 1
    mirroring: bool = True  # when the pool is predicted


class Run:
    """One run: a data set, plan, configuration and fold."""

    def __init__(self, request: Request, lock: int | None = None, is_looking: bool = False):
        """Finds the folders, and what was done before.

        Args:
            request: What is asked for.
            lock: The open file of the run's lock, which trainings inherit.
            is_looking: Only to say what is done, whatever has changed since.

        Raises:
            UserError: If the data, the plan, the settings or the state are not what the run can go on with.
        """
        self.request = request
        self.base = os.path.join(nnUNet_preprocessed, request.dataset)
        self.results = os.path.join(nnUNet_results, request.dataset)
        self.plans = read_plans(self.base, request.plans, request.configuration)
        self.cases = Cases(self.base, self.plans, request.configuration, request.fold)
        self.name = f"{request.plans}__{request.configuration}__fold_{request.fold}"
        self.identifier = self.cases.configuration.data_identifier
        self.folder = pseudo_folder(self.base, self.identifier, self.name)
        self.reports = os.path.join(
            self.results, f"rounds__{request.plans}__{request.configuration}", f"fold_{request.fold}"
        )
        self.state_file = os.path.join(self.folder, "state.json")
        self.state = self.open_state(is_looking)
        self.lock = lock

    # ---------------------------------------------------------------- state

    def open_state(self, is_looking: bool) -> dict[str, Any]:
        """The state as it was left, or a new one as long as nothing is done; refuses to mix what changed."""
        known = load_state(self.state_file)
        self.new_cases: list[str] = []
        if known and is_looking:
            return known
        if known and not known["steps"] and not any({"cases", "checkpoints"} & set(e) for e in known["rounds"]):
            known = None
        request = self.request
        inputs = {
            "nnunet_diffusion": version("nnunet_diffusion"),
            "trainer": request.trainer,
            "model": os.path.abspath(request.model) if request.model else "",
            "start": request.start,
            "finetune": request.finetune,
            "mirroring": request.mirroring,
            "gate": request.gate.as_dict(),
            "plan": digest(self.plans),
            "seeds": {name: block.get("seed") for name, block in self.plans.get("nnunet_diffusion", {}).items()},
            "labels": self.cases.dataset_json["labels"],
            "validation": sorted(self.validation()),
        }
        if known is None:
            state = {"format": FORMAT, "inputs": inputs, "cases": {}, "rounds": [], "steps": {}}
        else:
            inputs["validation"] = inputs["validation"] or known["inputs"]["validation"]
            known["inputs"]["validation"] = known["inputs"]["validation"] or inputs["validation"]
            refuse_changes(self.state_file, known["inputs"], inputs)
            state = known
        records, moved = self.cases.records(state["cases"]), set(self.cases.annotations)
        for kind, may_move in (("annotated", ()), ("pool", moved)):
            refuse_changed_cases(self.state_file, kind, state["cases"].get(kind, {}), records[kind], may_move)
        self.new_cases = sorted(
            case for kind in records for case in set(records[kind]) - set(state["cases"].get(kind, {})) if known
        )
        state["cases"] = records
        for entry in state["rounds"]:
            self.refuse_other_checkpoint(entry)
        return state

    def validation(self) -> list[str]:
        """The cases that this fold is validated on; none as long as there are no splits."""
        if not os.path.isfile(os.path.join(self.base, "splits_final.json")):
            return []
        return self.cases.split()[1]

    def refuse_other_checkpoint(self, entry: dict) -> None:
        """Raises UserError if what a training ended with or started from is no longer what it was."""
        for path, known in entry.get("checkpoints", {}).items():
            if not os.path.isfile(path) or record(path, known)["sha256"] != known["sha256"]:
                raise UserError(
                    f"{path}: is not the checkpoint that round {entry['round']} ended with: restore it, or remove the "
                    f"folder {self.folder} to start anew"
                )
        for path, known in entry.get("denoiser", {}).items():
            if os.path.isfile(path) and record(path, known)["sha256"] != known["sha256"]:
                raise UserError(
                    f"{path}: is not the denoiser that round {entry['round']} started from: restore it, or remove the "
                    f"folder {self.folder} to start anew"
                )

    def save(self) -> None:
        """Writes the state."""
        os.makedirs(self.folder, exist_ok=True)
        save_state(self.state_file, self.state)

    def entry(self, number: int) -> dict[str, Any]:
        """What is known of a round; 0 is the first training."""
        while len(self.state["rounds"]) <= number:
            self.state["rounds"].append({"round": len(self.state["rounds"])})
        return self.state["rounds"][number]

    def verdicts(self, number: int) -> dict[str, Verdict]:
        """The verdicts of a round."""
        return {case: Verdict(*verdict) for case, verdict in self.entry(number).get("verdicts", {}).items()}

    # ---------------------------------------------------------------- names

    def round_folder(self, number: int) -> str:
        """The pseudo labels of a round."""
        return os.path.join(self.folder, f"round_{number}")

    def predicted(self, number: int) -> str:
        """The predictions of a round."""
        return os.path.join(self.round_folder(number), "predicted")

    def round_plans(self, number: int | str) -> str:
        """The name of the plans with a round's settings."""
        return f"{self.request.plans}_round{number}"

    def model(self, number: int | str) -> str:
        """The model folder of a round."""
        if number == 0:
            trained = f"{self.request.trainer}__{self.request.plans}__{self.request.configuration}"
            return os.path.abspath(self.request.model) if self.request.model else os.path.join(self.results, trained)
        return os.path.join(self.results, f"{TRAINER}__{self.round_plans(number)}__{self.request.configuration}")

    def final_model(self) -> str:
        """Where `nnUNetv2_predict -tr PseudoLabelTrainer -p PLANS` looks."""
        return os.path.join(self.results, f"{TRAINER}__{self.request.plans}__{self.request.configuration}")

    def folds(self, number: int | str) -> list[str]:
        """The folds that teach: of a given model all, if nothing is validated on; else this run's own."""
        if number == 0 and self.request.model and self.request.fold == "all":
            folder = self.model(0)
            return sorted(name[5:] for name in os.listdir(folder)
                          if os.path.isfile(os.path.join(folder, name, CHECKPOINT)))  # fmt: skip
        return [self.request.fold]

    def checkpoints(self, number: int | str) -> list[str]:
        """The checkpoints of a round's model."""
        return [os.path.join(self.model(number), f"fold_{fold}", CHECKPOINT) for fold in self.folds(number)]

    # ---------------------------------------------------------------- looking only

    def table(self, rounds: int) -> str:
        """What is done, a line for each round."""
        lines = ["round  predicted  kept  waiting  dropped  trained  agreement"]
        for number in range(rounds + 1):
            entry = self.state["rounds"][number] if number < len(self.state["rounds"]) else {}
            decisions = [verdict[0] for verdict in entry.get("verdicts", {}).values()]
            cases = entry.get("cases", [])
            there = sum(os.path.isfile(os.path.join(self.predicted(number), case + ".b2nd")) for case in cases)
            counts = [decisions.count(kind) if decisions else "-" for kind in ("keep", "wait", "drop")]
            agreement = entry.get("agreement")
            cells = [number, f"{there}/{len(cases)}" if cases else "-", *counts]
            cells += ["yes" if "checkpoints" in entry else "no", "-" if agreement is None else f"{agreement:.3f}"]
            lines.append(
                "  ".join(str(cell).rjust(width) for cell, width in zip(cells, (5, 9, 4, 7, 7, 7, 9), strict=True))
            )
        return "\n".join(lines)

    def plan_of_work(self, rounds: int) -> str:
        """What would be done, with the numbers of cases as they are now."""
        trained = [entry["round"] for entry in self.state["rounds"] if "checkpoints" in entry]
        annotated = len(self.state["cases"]["annotated"])
        first = self.request.model or self.request.trainer
        lines = [f"round 0: {first} on {annotated} annotated cases, less those validated on"]
        lines += [
            f"round {number}: predict {len(self.state['cases']['pool'])} scans of the pool, gate, train {TRAINER}"
            for number in range(1, rounds + 1)
        ]
        lines = [line + (" (done)" if number in trained else "") for number, line in enumerate(lines)]
        return "\n".join([*lines, f"then: {self.final_model()}"])


def remove_stale(folder: str) -> None:
    """Removes the temporary files (`nnunet_diffusion.files.atomic`) that killed writers left in a folder and below.

    Parts write beside this process, on other machines too, whose processes cannot be seen from here, but none of them
    for long. So a file goes when nobody wrote to it for an hour and this machine has no such process, or for a day, by
    when the number may be another process's.
    """
    for path in glob.glob(os.path.join(glob.escape(folder), "**", ".tmp[0-9]*_*"), recursive=True):
        number = re.match(r"\.tmp(\d+)_", os.path.basename(path))
        with suppress(FileNotFoundError):  # its writer ended just now
            quiet_s = time.time() - os.path.getmtime(path)
            if number and (quiet_s > DAY_S or (quiet_s > HOUR_S and not _is_running(int(number[1])))):
                os.remove(path)


def _is_running(process: int) -> bool:
    """Whether this machine has a process of that number; where it cannot be asked, on Windows, as if it had."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
