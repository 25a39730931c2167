"""What the loss for partial labels costs against nnU-Net's own, forward and backward, as ratios: A B A B, one machine.

On a CPU, memory is the peak of a process of its own above what it held before the loss.

An example, on a CPU:
  OMP_NUM_THREADS=1 python benchmarks/partial_loss.py --patch 128 --classes 14
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time

import torch

from nnunet_diffusion.partial.losses import PartialLabelLoss, annotated, merged_into_background

TIME_GOAL, MEMORY_GOAL = 1.05, 1.10


class Case:
    """A batch of which each case annotates a third of the classes, others each; and both losses."""

    def __init__(self, classes: int, patch: int, batch: int, device: str):
        torch.manual_seed(0)
        self.device = device
        shape = (patch,) * 3
        is_annotated = torch.arange(classes).repeat(batch, 1) % 3 == torch.arange(batch)[:, None] % 3
        is_annotated[:, 0] = True
        self.group = merged_into_background(is_annotated)
        self.logits = torch.randn(batch, classes, *shape, device=device).mul_(2).requires_grad_()
        target = torch.randint(0, classes, (batch, 1, *shape))
        self.target = self.group.gather(1, target.flatten(1)).view_as(target).short().to(device)
        self.loss = PartialLabelLoss(batch_dice=True)

    def ours(self) -> None:
        """Runs one forward and backward pass of the partial loss."""
        with annotated(self.loss, self.group):
            self._pass(self.loss)

    def stock(self) -> None:
        """Runs one of nnU-Net's loss, which takes what is not annotated for background."""
        self._pass(self.loss.complete)

    def _pass(self, loss: torch.nn.Module) -> None:
        self.logits.grad = None
        loss(self.logits, self.target).backward()
        if self.device == "cuda":
            torch.cuda.synchronize()


def peak_mib(name: str, *arguments) -> float:
    """Measures peak memory of one pass above what the batch takes; to be called in a fresh process."""
    case = Case(*arguments)
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        getattr(case, name)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(case, name)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def measure(classes: int, patch: int, batch: int, device: str, rounds: int) -> dict:
    """Measures time and memory of both losses, and their ratios."""
    memory = {}
    for name in ("ours", "stock"):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory[name] = process.apply(peak_mib, (name, classes, patch, batch, device))
    case, seconds = Case(classes, patch, batch, device), {"ours": [], "stock": []}
    for number in range(rounds + 1):
        for name, times in seconds.items():
            start = time.perf_counter()
            getattr(case, name)()
            if number:  # the first is to warm up
                times.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]  # a busy moment slows both of a pair
    logits_mib = case.logits.nbytes / 2**20
    return {
        "classes": classes,
        "patch": patch,
        "batch": batch,
        **{f"{name}_seconds": round(statistics.median(times), 4) for name, times in seconds.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        **{f"{name}_peak_mib": round(peak + logits_mib) for name, peak in memory.items()},  # with the logits
        "memory_ratio": round((memory["ours"] + logits_mib) / (memory["stock"] + logits_mib), 3),
        "rounds": rounds,
    }


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[14], help="background included (default: 14)")
    parser.add_argument("--patch", type=int, default=128, help="edge of the cube, voxels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="cases (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs (default: %(default)s)")
    args = parser.parse_args()
    rows = [measure(classes, args.patch, args.batch, args.device, args.rounds) for classes in args.classes]
    goals = {"time_ratio": TIME_GOAL, "memory_ratio": MEMORY_GOAL}
    about = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"goals": goals, **about, "measured": rows}, indent=2))


if __name__ == "__main__":
    main()
