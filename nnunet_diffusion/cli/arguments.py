"""What several commands are told: the data, the plan, the fold, the limits of the filter, where cases are worked on."""

import argparse

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.names import safe_name


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that `request_of` reads."""
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="data set id or name")
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", required=True, help="configuration of the plan")
    parser.add_argument("-f", dest="fold", metavar="FOLD", required=True, help="a number, or all: nothing is held out")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-num_gpus", "--num_gpus", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--gate", nargs="+", default=[], metavar="KEY=VALUE", help="limits: see docs/rounds.md")


def add_worker_arguments(parser: argparse.ArgumentParser, what: str, default: int | None = None) -> None:
    """Declares the arguments that `workers_of` reads: where `what` is done."""
    told = "nnU-Net's (nnUNet_def_n_proc)" if default is None else default
    parser.add_argument(
        "-np", dest="num_processes", type=int, default=default, metavar="N",
        help=f"processes for {what}, or jobs that a batch system runs at most; default: {told}",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", default="", metavar="WHERE",
        help=f"do {what} on a Dask cluster: its address or file, or slurm, lsf, pbs, sge: see docs/cluster.md",
    )  # fmt: skip


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of a command that can say how far it is."""
    parser.add_argument("--status", action="store_true", help="say what is done, failed and left, and how fast")
    parser.add_argument("--json", action="store_true", help="with --status: for a program to read")


def check_status_usage(args: argparse.Namespace) -> None:
    """Raises UserError for --json alone."""
    if args.json and not args.status:
        raise UserError("--json: goes with --status")


def workers_of(args: argparse.Namespace):
    """Builds the `Workers` of the arguments; raises UserError for a number that is none."""
    from nnunet_diffusion.workers import Workers

    if args.num_processes is None:
        from nnunetv2.configuration import default_num_processes

        args.num_processes = default_num_processes
    if args.num_processes < 1:
        raise UserError(f"-np {args.num_processes}: at least 1")
    return Workers(args.num_processes, args.scheduler)


def check_usage(args: argparse.Namespace) -> None:
    """Raises UserError for a fold or a name that cannot be one, before anything heavy is imported."""
    if not (args.fold == "all" or args.fold.isdigit()):
        raise UserError(f"-f {args.fold}: give the number of a fold, or all")
    safe_name(args.plans, "-p", "give the name of a plan")
    safe_name(args.configuration, "-c", "give the name of a configuration")


def request_of(args: argparse.Namespace, dataset: str, **more):
    """Builds the `Request` of the arguments for a data set, given its folder's name; `more` are further fields."""
    from nnunet_diffusion.rounds.gate import GateSettings
    from nnunet_diffusion.rounds.places import Request
    from nnunet_diffusion.trainers import settings_of

    gate = GateSettings.from_pairs(args.gate)
    return Request(dataset, args.configuration, args.fold, args.plans, gate=gate, device=args.device,
                   num_gpus=args.num_gpus, settings_of=settings_of, workers=workers_of(args), **more)  # fmt: skip
