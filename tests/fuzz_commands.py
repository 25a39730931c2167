"""Every command once: its arguments, the files that it reads and where it may write."""

from dataclasses import dataclass

import tiny

MODEL, DENOISER = "DiffusionPretrainedTrainer", "DenoisingDiffusionTrainer"
STAGES = ("MutualDifferenceTrainer", "MutualSimilarityTrainer")
TOP, NAME, PLANS = "a/b", tiny.NAME, tiny.PLANS
RAW, BASE, RESULTS = (f"{TOP}/nnunet/nnUNet_{kind}/{NAME}" for kind in ("raw", "preprocessed", "results"))
GIVEN, MADE = f"{TOP}/given", f"{TOP}/made"
OURS = f"{RESULTS}/{MODEL}__{PLANS}__2d"
DRAWER = f"{RESULTS}/{DENOISER}__{PLANS}__2d/fold_0"
FINAL = f"{OURS}/fold_0/checkpoint_final.pth"
DATA, COPY, SPLITS = f"{RAW}/dataset.json", f"{BASE}/dataset.json", f"{BASE}/splits_final.json"
PLAN, COMPACT = f"{BASE}/{PLANS}.json", f"{BASE}/nnUNetCompactPlans.json"
CASES = [f"{BASE}/nnUNetCompactPlans_2d/tiny_00[0-4]{end}" for end in (".b2nd", "_seg.b2nd", ".pkl")]
POOL, MARKS = f"{BASE}/*/tiny_10[01].*", f"{BASE}/**/.nnunet_diffusion/*.json"
SCANS, LABELS = f"{RAW}/images??/*", f"{RAW}/labelsTr/*"
ROUNDS_STATE, ROUNDS_READ = f"{BASE}/**/state.json", [PLAN, SPLITS, COPY, MARKS]


@dataclass(frozen=True)
class Command:
    """What is run, and what it has to do with which files; patterns are below the box of `fuzz_world.World`.

    Attributes:
        argv: With `{box}` for the box.
        reads: A file or a group of files each; each is as likely to be spoiled, however many are in it.
        writes: Files that it may make and change.
    """

    argv: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def arguments(self, box: str) -> list[str]:
        """The command line."""
        return [argument.replace("{box}", box) for argument in self.argv.split()]


def trained(trainer: str, plans: str = PLANS, fold: str = "0") -> tuple[str, str]:
    """Where a training writes."""
    model = f"{RESULTS}/{trainer}__{plans}__2d"
    return f"{model}/*.json", f"{model}/fold_{fold}/*"


PREPROCESS = "plan_and_preprocess -d 990 -c 2d -pl CompactPlanner -np 1"
TRAIN = "train 990 2d 0 -device cpu"
ROUNDS = f"rounds -d 990 -c 2d -f 0 -p {PLANS} --from {{box}}/{OURS} --start scratch --rounds 1 --gate is_open=true"
ROUNDS += " -device cpu --disable_tta"
DRAW = "-n 2 --steps 2 --device cpu --batch_size 2"

# in an order in which each finds what it needs
COMMANDS = {
    "convert folder": Command(
        f"convert folder {{box}}/{GIVEN}/ct {{box}}/{GIVEN}/labels --unlabeled {{box}}/{GIVEN}/more -d 501 -n Own"
        f" --labels {{box}}/{GIVEN}/labels.json --annotated {{box}}/{GIVEN}/annotated.json -np 1",
        (f"{GIVEN}/labels.json", f"{GIVEN}/annotated.json", f"{GIVEN}/ct/*", f"{GIVEN}/labels/*", f"{GIVEN}/more/*"),
        (f"{TOP}/nnunet/nnUNet_raw/Dataset501_Own/*",),
    ),
    "convert flare22": Command(
        f"convert flare22 {{box}}/{GIVEN}/flare22 -d 22 -np 1",
        (f"{GIVEN}/flare22/*",),
        (f"{TOP}/nnunet/nnUNet_raw/Dataset022_FLARE22/*",),
    ),
    "convert partial": Command(
        f"convert partial {{box}}/{GIVEN}/mapping.json -d 600 -n Joined -np 1",
        (f"{GIVEN}/mapping.json", f"{GIVEN}/mapping.json", DATA, LABELS),
        (f"{TOP}/nnunet/nnUNet_raw/Dataset600_Joined/*",),
    ),
    "plan_and_preprocess": Command(
        PREPROCESS,
        (DATA, DATA, f"{BASE}/dataset_fingerprint.json", COMPACT, MARKS, f"{BASE}/*.json", *CASES, POOL, SCANS, LABELS),
        (f"{BASE}/*",),
    ),
    "plan_and_preprocess part": Command(
        f"{PREPROCESS} --num_parts 2 --part_id 0", (DATA, COMPACT, MARKS), (f"{BASE}/*",)
    ),
    "train": Command(
        f"{TRAIN} -tr PartialLabelTrainer -p {PLANS}",
        (COPY, SPLITS, PLAN, *CASES),
        trained("PartialLabelTrainer"),
    ),
    "train from denoiser": Command(
        f"{TRAIN} -tr {MODEL} -p FromDenoiser",
        (f"{GIVEN}/denoiser.pth", f"{BASE}/FromDenoiser.json"),
        trained(MODEL, "FromDenoiser"),
    ),
    "train from weights": Command(
        f"{TRAIN} -tr ConfiguredTrainer -p {PLANS} -pretrained_weights {{box}}/{FINAL}",
        (FINAL,),
        trained("ConfiguredTrainer"),
    ),
    "train denoiser": Command(
        f"train 990 2d all -tr {DENOISER} -p {PLANS} -device cpu", (PLAN, COPY, POOL), trained(DENOISER, fold="all")
    ),
    "plan like": Command(
        f"plan_and_preprocess -d 990 --like {{box}}/{GIVEN}/shared -np 1",
        tuple(f"{GIVEN}/shared/{name}" for name in ("denoiser.pth", "plans.json", "dataset_fingerprint.json")),
        (f"{BASE}/*",),
    ),
    "export denoiser": Command(
        f"export --denoiser {{box}}/{MADE}/shared -d 990 -p {PLANS} -c 2d -f 0",
        (f"{DRAWER}/denoiser.pth", f"{RESULTS}/{DENOISER}__{PLANS}__2d/*.json"),
        (f"{MADE}/shared/*",),
    ),
    "train continued": Command(f"{TRAIN} -tr {MODEL} -p {PLANS} --c", (FINAL, PLAN), trained(MODEL)),
    "rounds": Command(
        ROUNDS,
        (*ROUNDS_READ, ROUNDS_STATE, *CASES, f"{OURS}/*.json", FINAL,
         f"{BASE}/**/round_1/**/*.*"),
        (f"{BASE}/*pseudo*", f"{BASE}/{PLANS}_round1.json", f"{RESULTS}/rounds__*",
         f"{RESULTS}/PseudoLabelTrainer__{PLANS}*"),
    ),
    "rounds status": Command(f"{ROUNDS} --status", (PLAN, SPLITS, COPY, ROUNDS_STATE)),
    "rounds dry_run": Command(f"{ROUNDS} --dry_run", (*ROUNDS_READ, ROUNDS_STATE)),
    "train pseudo": Command(
        f"{TRAIN} -tr PseudoLabelTrainer -p {PLANS}_round1",
        (f"{BASE}/{PLANS}_round1.json", f"{BASE}/**/round_1/*"),
        trained("PseudoLabelTrainer", f"{PLANS}_round1"),
    ),
    "mutual": Command(
        f"mutual -d 990 -c 2d -f 0 -p {PLANS} -device cpu",
        (PLAN, SPLITS, COPY, f"{RESULTS}/mutual__*/fold_0/*.json",
         f"{RESULTS}/{STAGES[0]}__*/fold_0/checkpoint_final.pth", f"{BASE}/**/completed.json", *CASES),
        (f"{BASE}/*completed*", f"{RESULTS}/mutual__*", *trained("Mutual*Trainer")),
    ),
    "sample": Command(
        f"sample -d 990 -c 2d -f 0 -p {PLANS} {DRAW}",
        (f"{DRAWER}/denoiser.pth", f"{DRAWER}/samples/samples.json", PLAN),
        (f"{DRAWER}/samples/*",),
    ),
    "sample file": Command(
        f"sample --denoiser {{box}}/{GIVEN}/denoiser.pth {DRAW} -o {{box}}/{MADE}/samples",
        (f"{GIVEN}/denoiser.pth", f"{MADE}/samples/samples.json", f"{MADE}/samples/*.nii.gz"),
        (f"{MADE}/samples/*",),
    ),
    "evaluate_samples": Command(
        f"evaluate_samples {{box}}/{MADE}/samples -d 990 -k 1 --real 2 --device cpu",
        (f"{MADE}/samples/samples.json", f"{MADE}/samples/*.nii.gz", PLAN, f"{GIVEN}/denoiser.pth"),
        (f"{MADE}/samples/quality_*",),
    ),
    "evaluate": Command(
        f"evaluate {{box}}/{OURS}/fold_0/validation {{box}}/{GIVEN}/references -d 990 -np 1 --chill",
        (DATA, DATA, f"{GIVEN}/references/tiny_004.nii.gz", f"{OURS}/fold_0/validation/*.nii.gz"),
        (f"{OURS}/fold_0/validation/evaluation_*",),
    ),
    "report": Command(
        f"report -d 990 --evaluation {{box}}/{GIVEN}/evaluation_nnunet.json",
        (DATA, SPLITS, SCANS, f"{OURS}/plans.json", f"{OURS}/fold_0/validation/summary.json", f"{OURS}/fold_0/*.json",
         f"{RESULTS}/rounds__*/**/*.json",
         f"{OURS}/fold_0/validation/*.nii.gz", f"{OURS}/fold_0/training_log*", f"{DRAWER}/denoiser.pth", ROUNDS_STATE,
         f"{GIVEN}/evaluation_nnunet.json"),
        (f"{RESULTS}/report.html",),
    ),
    "export": Command(
        f"export --stock -d 990 -tr {MODEL} -p {PLANS} -c 2d -o {{box}}/{MADE}/exported",
        (f"{OURS}/plans.json", f"{OURS}/dataset.json", FINAL),
        (f"{MADE}/exported/*",),
    ),
    "demo": Command(
        f"demo --data 990 -c 2d -pl CompactPlanner -o {{box}}/{MADE}/demo --epochs 1 --pretraining_epochs 1",
        (DATA, SPLITS, COMPACT, f"{MADE}/demo/**/*.json", LABELS, f"{MADE}/demo/predictions/*/*.nii.gz"),
        (f"{MADE}/demo/*", f"{BASE}/*", f"{RESULTS}/*CompactPlans_demo*",
         f"{RESULTS}/report.html", f"{RESULTS}/*/evaluation_*"),
    ),
    "env": Command(f"env --root {{box}}/{TOP}/nnunet"),
    "env --check": Command(f"env --check --root {{box}}/{TOP}/nnunet"),
}  # fmt: skip
