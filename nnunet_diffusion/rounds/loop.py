"""The loop: train on what is annotated, predict the pool, filter, train a fresh schedule on both, repeat."""

import os
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

from nnunet_diffusion.commands import Step, Steps, command_environment
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.marks import mark, refuse_foreign
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.records import Journal, digest, made_from, refuse_other, some
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.disk import mark_predictions, remove_confidence, remove_rounds, told_estimate
from nnunet_diffusion.rounds.filtering import filter_round, read_verdicts
from nnunet_diffusion.rounds.given_model import check_model, refuse_unusable_start
from nnunet_diffusion.rounds.outcome import publish, refuse_foreign_outcome
from nnunet_diffusion.rounds.places import Places, Request
from nnunet_diffusion.rounds.prediction import is_predicted, predict
from nnunet_diffusion.rounds.pseudo_labels import pseudo_cases
from nnunet_diffusion.rounds.stale import remove_stale
from nnunet_diffusion.rounds.state import Round, State, anew, cases_of_round, fallen, last_good, load_state
from nnunet_diffusion.rounds.teacher import Model
from nnunet_diffusion.rounds.training import denoiser_of, training, validation_dice, write_plans
from nnunet_diffusion.settings import BLOCK
from nnunet_diffusion.workers import work_on

FIRST = "training on annotated cases"


class Rounds:
    """One run: a data set, plan, configuration and fold."""

    def __init__(self, request: Request, lock: int | None = None, is_looking: bool = False):
        """Finds the data, and what was done before.

        Args:
            request: What is asked for.
            lock: The open file of the run's lock, which trainings inherit.
            is_looking: Only to say what is done, whatever has changed since.

        Raises:
            UserError: If the data, the plan, the settings or the state are not what the run can go on with.
        """
        self.request, self.lock = request, lock
        self.plans = read_plans(request.base, request.plans, request.configuration)
        self.cases = Cases(request.base, self.plans, request.configuration, request.fold)
        self.places = Places(request, self.cases.configuration.data_identifier)
        self.new_cases: list[str] = []
        known = load_state(self.places.state)
        if known and is_looking:
            self.state = known
            return
        if known and not known.steps and not known.round(0).checkpoints:
            known = None  # nothing was done with it
        refuse_foreign(self.places.folder)
        refuse_foreign_outcome(self.places)
        self.state = self.compared(known)

    # ---------------------------------------------------------------- what is there

    def compared(self, known: State | None) -> State:
        """Returns the state to go on with; raises UserError if anything that the run was made from has changed."""
        request, file = self.request, self.places.state
        held_out = self.cases.held_out() or (known.made_from["values"].get("validation", []) if known else [])
        now = made_from({
            "nnunet_diffusion": version("nnunet_diffusion"),
            "trainer": request.trainer,
            "round_trainer": request.round_trainer,
            "model": os.path.abspath(request.model) if request.model else "",
            "start": request.start,
            "finetune": request.finetune,
            "mirroring": request.mirroring,
            "gate": request.gate.as_dict(),
            "plan": digest(self.plans),
            "seeds": {name: block.get("seed") for name, block in self.plans.get(BLOCK, {}).items()},
            "labels": self.cases.dataset_json["labels"],
            "validation": held_out,
        }, self.cases.recorded())  # fmt: skip
        if known is None:
            return State(now)
        before = known.made_from
        self.new_cases = sorted(
            case for kind, cases in now["cases"].items() for case in cases.keys() - before["cases"].get(kind, {}).keys()
        )
        before["values"]["validation"] = before["values"].get("validation") or held_out
        for case in before["cases"].get("pool", {}).keys() & now["cases"]["annotated"].keys():
            del before["cases"]["pool"][case]  # annotated meanwhile
        refuse_other(file, before, now, anew(file), growing=("annotated", "pool"))
        for entry in known.rounds:
            self.refuse_other_weights(known, entry, "checkpoint", "ended with", entry.checkpoints)
            self.refuse_other_weights(known, entry, "denoiser", "started from", entry.denoiser)
        known.made_from = now
        return known

    def refuse_other_weights(self, known: State, entry: Round, kind: str, how: str, files: dict[str, str]) -> None:
        """Raises UserError if what a training ended with or started from has changed; a denoiser may be gone."""
        for path, sha256 in files.items():
            if known.sha256(path) != sha256 if os.path.isfile(path) else kind == "checkpoint":
                remedy = f"restore it, or {anew(self.places.state)}"
                raise UserError(f"{path}: is not the {kind} that round {entry.number} {how}: {remedy}")

    def save(self) -> None:
        """Writes the state."""
        self.state.save(self.places.state)

    def verdicts_before(self, number: int) -> list[dict]:
        """Reads the verdicts of the rounds before one, in their order."""
        return [read_verdicts(self.places, self.state.round(n)) for n in range(1, number)]

    def dices(self) -> list[float | None]:
        """Lists the validation Dice of the rounds that were trained."""
        return [entry.validation_dice for entry in self.state.rounds if entry.checkpoints]

    def fallen(self) -> int | None:
        """Finds the first round whose model is worse than the best before; None so far."""
        return fallen(self.dices(), self.request.tolerance)

    # ---------------------------------------------------------------- what is done

    def run(self, rounds: int, stop_after: str = "") -> None:
        """Does all that is not done; ends after the first stage of a kind that had something to do, if asked to.

        Raises:
            UserError: If a stage fails.
        """
        if self.new_cases:
            print(f"{len(self.new_cases)} new cases, which join the next round: {some(self.new_cases)}", flush=True)
        for number in (*range(1, rounds + 1), "finetune"):  # rather than after hours
            refuse_foreign(os.path.join(self.places.model(number), f"fold_{self.request.fold}"))
        mark(self.places.folder, run=self.places.name)
        self.save()
        remove_stale(self.places.folder)
        remove_stale(self.places.reports, is_ours_alone=True)
        print(told_estimate(self.places, self.cases, rounds), flush=True)
        environment = command_environment(None, self.request.device)
        inherited = () if self.lock is None else (self.lock,)
        total = 3 * rounds + 2 + self.request.finetune
        steps = Steps(self.places.reports, environment, total, self.state.steps, self.save, inherited)
        steps.run_all(self.stages(rounds), stop_after)

    def stages(self, rounds: int) -> Iterator[Step]:
        """Yields all that is to be done, in order, until the last round or until the validation Dice falls."""
        yield self.first_training(rounds)
        for number in range(1, rounds + 1):
            if (worse := self.fallen()) is not None:
                print(f"round {worse}: the validation Dice fell: stopped", flush=True)
                break
            entry = self.begin(number)
            yield Step(f"round {number}: predicting", do=partial(self.predict, entry), kind="predict",
                       is_done=lambda entry=entry: bool(entry.verdicts) or not self.to_predict(entry))  # fmt: skip
            yield Step(f"round {number}: filtering", do=partial(self.filter, entry), kind="gate",
                       is_done=lambda entry=entry: bool(entry.verdicts),
                       then=partial(remove_confidence, self.places, number))  # fmt: skip
            yield self.round_training(entry, rounds)
        outcome: int | str = last_good(self.dices(), rounds, self.request.tolerance)
        if self.request.finetune:
            yield self.finetuning(outcome)
            outcome = "finetune"
        yield Step("outcome", do=lambda: publish(self.places, outcome))
        what = "the fine-tuning" if outcome == "finetune" else f"round {outcome}"
        print(f"{self.places.outcome()}: the model of {what}")

    def first_training(self, rounds: int) -> Step:
        """Trains on what is annotated, unless there is such a model, which is checked."""
        entry, request = self.state.round(0), self.request
        hooks = {"is_done": lambda: bool(entry.checkpoints), "then": lambda: self.finish(entry, rounds)}
        if not entry.checkpoints:
            refuse_unusable_start(self.places, self.plans)
        is_begun = FIRST in self.state.steps
        if request.model or (not is_begun and all(map(os.path.isfile, self.places.checkpoints(0)))):
            check = partial(check_model, self.places, self.cases, self.plans)
            return Step("checking the first model", do=check, kind="train", **hooks)
        folder = os.path.join(self.places.model(0), f"fold_{request.fold}")
        if not is_begun and os.path.isdir(folder):
            raise UserError(f"{folder}: holds a training that is not finished: finish it (--c), or remove it")
        settings = request.settings_of(self.plans, request.trainer)
        return training(self.places, 0, FIRST, settings, {"plan": digest(self.plans)}, **hooks)

    def round_training(self, entry: Round, rounds: int) -> Step:
        """Trains a fresh schedule on annotated cases and on what was kept."""
        number, places = entry.number, self.places
        if not entry.checkpoints and not pseudo_cases(places.round(number)):
            raise UserError(
                f"round {number}: the gate kept nothing, see {places.reports}/round_{number}/report.md: train the "
                "first model better, or open the gate (--gate KEY=VALUE)"
            )
        settings = write_plans(places, self.plans, number, number - 1)
        depends_on = {"settings": settings, "annotated": digest(self.state.made_from["cases"]["annotated"])}
        depends_on |= {"verdicts": entry.verdicts, "teacher": self.teacher(number)}
        hooks = {"is_done": lambda: bool(entry.checkpoints), "then": lambda: self.finish(entry, rounds)}
        return training(places, number, f"round {number}: training", settings, depends_on, **hooks)

    def finetuning(self, outcome: int) -> Step:
        """Trains on annotated cases alone, from the weights of the outcome."""
        settings = write_plans(self.places, self.plans, "finetune", outcome)
        depends_on = {"settings": settings, "annotated": digest(self.state.made_from["cases"]["annotated"])}
        depends_on["checkpoints"] = self.state.round(outcome).checkpoints
        return training(self.places, "finetune", "fine-tuning on annotated cases", settings, depends_on)

    def finish(self, entry: Round, rounds: int) -> None:
        """Records a training, and fixes what the next round predicts, so that other machines can begin with it."""
        model, fold = self.places.model(entry.number), self.request.fold
        denoiser = denoiser_of(model, fold)
        entry.validation_dice = validation_dice(model, fold)
        entry.denoiser = {denoiser: self.state.sha256(denoiser)} if denoiser else {}
        entry.checkpoints = {path: self.state.sha256(path) for path in self.places.checkpoints(entry.number)}
        self.save()
        remove_rounds(self.places, entry.number)
        if entry.number < rounds and self.fallen() is None:
            self.begin(entry.number + 1)

    def begin(self, number: int) -> Round:
        """Fixes which cases a round predicts."""
        entry = self.state.round(number)
        if entry.cases is None:
            before = self.verdicts_before(number)
            dropped = self.state.round(number - 1).dropped
            candidates = self.cases.to_predict()
            entry.cases, entry.dropped = cases_of_round(candidates, before[-1] if before else {}, dropped)
            self.save()
        return entry

    def teacher(self, number: int) -> str:
        """Names the weights that a round is predicted with."""
        return digest(sorted(self.state.round(number - 1).checkpoints.values()))

    def to_predict(self, entry: Round, num_parts: int = 1, part_id: int = 0) -> list[str]:
        """Lists the cases of a round, or of a part of it, that are not predicted yet."""
        candidates, teacher = self.cases.to_predict(), self.teacher(entry.number)
        folder = self.places.predicted(entry.number)
        mine = entry.cases[part_id::num_parts]
        return [case for case in mine if case in candidates and not is_predicted(folder, case, teacher)]

    def predict(self, entry: Round, num_parts: int = 1, part_id: int = 0) -> None:
        """Predicts what is not predicted yet of a round's cases, or of a part of them, in other processes than this."""
        if not (todo := self.to_predict(entry, num_parts, part_id)):
            return
        number, request, places = entry.number, self.request, self.places
        folds, device = tuple(places.folds(number - 1)), request.device
        model = Model(places.model(number - 1), folds, self.teacher(number), device, request.mirroring)
        folder, killed = places.predicted(number), {}
        mark_predictions(places, number)
        work = partial(predict_name, model, self.cases, folder, places.predicted(number - 1))
        tasks = {case: (case,) for case in todo}
        for _ in work_on(work, tasks, request.predictors, f"round {number}: predicting", killed):
            pass
        if killed:
            failed = Journal(places.failed(number), {})
            for case, why in killed.items():
                failed.add(case, why)

    def predict_part(self, rounds: int, num_parts: int, part_id: int) -> None:
        """Predicts a part of the pool for the round that is due; writes nothing but predictions.

        Raises:
            UserError: If no round waits for predictions.
        """
        due = [entry for entry in self.state.rounds if entry.cases is not None and not entry.verdicts]
        if not due or due[0].number > rounds:
            file = self.places.state
            raise UserError(f"{file}: no round waits for predictions: run it with --stop_after train first")
        self.predict(due[0], num_parts, part_id)

    def filter(self, entry: Round) -> None:
        """Filters the predictions of a round."""
        filter_round(self.places, self.cases, entry, self.verdicts_before(entry.number))
        self.save()


def predict_name(model: Model, cases: Cases, folder: str, before: str, name: str) -> None:
    """Predicts one case of a round, in a worker."""
    predict(model, name, cases.case(name), folder, before, cases.channels)
