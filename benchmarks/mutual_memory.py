"""Peak memory (resident set, CPU) of training K members: plain, with checkpointing, in turns.

Each row is a process of its own that builds the members and the loss of stage 1 for a plan, and trains two steps on
random images of the plan's batch and patch size; memory counts from before the first step. In the repository:

  python benchmarks/mutual_memory.py nnUNet_preprocessed/Dataset501_OpenKBP/nnUNetCompactPlans.json -c 2d
"""

import argparse
import resource
import subprocess
import sys
import time
from itertools import product

MODES = ("plain", "checkpointing", "alternate")


def step_memory(plans_file: str, configuration: str, members: int, mode: str) -> tuple[float, float]:
    """Measures peak MiB above what was there before the first step, and the seconds of the second step."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_diffusion.mutual.losses import DifferenceLoss, GroupedBatch
    from nnunet_diffusion.mutual.network import PartialOrganMembers
    from nnunet_diffusion.partial.losses import PartialLabelLoss, merged_into_background

    torch.manual_seed(0)
    plans = PlansManager(plans_file)
    chosen = plans.get_configuration(configuration)
    classes, size = members + 1, max(chosen.batch_size, members)
    networks = [nnUNetTrainer.build_network_architecture(plans, chosen, 1, classes, False) for _ in range(members)]
    network = PartialOrganMembers(networks, classes)
    network.checkpointing, network.feature_stage = mode == "checkpointing", 1
    owned = torch.eye(classes, dtype=torch.bool)[1:]
    loss = DifferenceLoss(PartialLabelLoss(exclusion_weight=0.0), owned, feature_weight=0.1)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.99, nesterov=True)
    group = torch.arange(size) % members
    annotation = merged_into_background(torch.cat([torch.ones(members, 1, dtype=torch.bool), owned[:, 1:]], 1)[group])
    own_label = (group + 1).reshape(-1, *[1] * (1 + len(chosen.patch_size)))
    target = own_label * (torch.rand(size, 1, *chosen.patch_size) < 0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(2):
        start = time.time()
        learners = [step % members] if mode == "alternate" else range(members)
        optimizer.zero_grad(set_to_none=True)
        network.learner = learners[0] if mode == "alternate" else None
        outputs = network(torch.randn(size, 1, *chosen.patch_size))
        loss(outputs, GroupedBatch([target], annotation, group), learners, 1.0).backward()
        optimizer.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.time() - start


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans_file")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("--members", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*step_memory(args.plans_file, args.c, int(args.one[0]), args.one[1]))
        return
    print("| members | mode | peak MiB | seconds a step |\n|---|---|---|---|")
    for members, mode in product(args.members, MODES):
        command = [sys.executable, __file__, args.plans_file, "-c", args.c, "--one", str(members), mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds = map(float, done.stdout.split()[-2:])
        print(f"| {members} | {mode} | {peak:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
