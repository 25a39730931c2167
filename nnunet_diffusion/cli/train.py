"""`nnunet_diffusion train`: nnU-Net's training command, which torchrun can start on many machines as well."""

import argparse
import os

from nnunet_diffusion.errors import UserError

HELP = "train as nnUNetv2_train does, with the same arguments; also under torchrun, across machines or on CPUs"
NEEDS = ("nnUNet_preprocessed", "nnUNet_results")
EPILOG = """\
Without torchrun this is nnUNetv2_train, except that it is never without our trainers. Under torchrun every process
trains its share of the batch; -num_gpus is left out. Trainers of this package only.

example:
  nnunet_diffusion train 22 3d_fullres 0 -tr PartialLabelTrainer -p nnUNetDiffusionPlans
  torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
      --no-python nnunet_diffusion train 22 3d_fullres 0 -tr PartialLabelTrainer -p nnUNetDiffusionPlans
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments: nnUNetv2_train's."""
    parser.add_argument("dataset", help="data set id or name")
    parser.add_argument("configuration", help="of the plan")
    parser.add_argument("fold", help="a number, or all")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainer", metavar="TRAINER", help="default: %(default)s")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="checkpoint, or denoiser.pth, to start from")
    parser.add_argument("-num_gpus", type=int, default=1, metavar="N", help="of this machine; default: 1")
    parser.add_argument("--npz", action="store_true", help="save probabilities of the validation cases")
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    parser.add_argument("--val", action="store_true", help="only validate; the training must be finished")
    parser.add_argument("--val_best", action="store_true", help="validate with checkpoint_best")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")


def run(args: argparse.Namespace) -> int:
    """Trains in this process, in one for each GPU, or as one of torchrun's."""
    from nnunet_diffusion.installation import EXT_TRAINER, ext_trainer_folders, with_our_trainers
    from nnunet_diffusion.processes import end_with_starter

    end_with_starter()
    os.environ[EXT_TRAINER] = with_our_trainers(ext_trainer_folders())
    if args.c and args.val:
        raise UserError("--c and --val: give one of them")
    if args.val_best and args.disable_checkpointing:
        raise UserError("--val_best and --disable_checkpointing: give one of them")
    if not (args.fold == "all" or args.fold.isdigit()):
        raise UserError(f"fold {args.fold}: must be a number, or all")
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number > 1 and args.num_gpus > 1:
        raise UserError("-num_gpus: torchrun decides how many processes there are: leave it out")
    check_request(args)

    import torch

    torch.set_num_threads(1 if number > 1 else number_of_threads(args.device))
    if args.num_gpus > 1:
        train_on_gpus(args)
    elif number > 1:
        train_as_one_of_many(args)
    else:
        train(args, torch.device(args.device))
    return 0


def check_request(args: argparse.Namespace) -> None:
    """Raises UserError for what nnU-Net would answer with a traceback."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from nnunet_diffusion.files import read_json
    from nnunet_diffusion.installation import usable_device
    from nnunet_diffusion.model_folder import load_nothing_but_plain_values, load_plain
    from nnunet_diffusion.plans import read_plans
    from nnunet_diffusion.schemas import Dataset

    usable_device(args.device)
    if args.num_gpus > 1 and args.device != "cuda":
        raise UserError(f"-num_gpus {args.num_gpus}: only with -device cuda")
    if args.c and args.pretrained_weights:
        raise UserError("--c and -pretrained_weights: give one of them")
    try:
        dataset = maybe_convert_to_dataset_name(args.dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"data set {args.dataset!r}: {error}") from error
    folder = os.path.join(os.environ["nnUNet_preprocessed"], dataset)
    read_plans(folder, args.plans, args.configuration)
    read_json(os.path.join(folder, "dataset.json"), Dataset)
    refuse_unknown_trainer(args.trainer)
    load_nothing_but_plain_values()
    if args.pretrained_weights:
        load_plain(args.pretrained_weights, "give a checkpoint that nnU-Net wrote, or a denoiser.pth")


def refuse_unknown_trainer(name: str) -> None:
    """Raises UserError, with the trainers there are, if nnU-Net finds none of that name."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_diffusion.installation import EXT_TRAINER, trainer_names

    if name in trainer_names():
        return
    try:
        recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"-tr {name}: there is no such trainer: give {', '.join(trainer_names())}, one of nnU-Net's own such as "
            f"nnUNetTrainer, or add the folder of yours to {EXT_TRAINER}"
        ) from error


def number_of_threads(device: str) -> int:
    """Chooses as nnUNetv2_train: all cores on a CPU, where nobody has set fewer; one beside a GPU."""
    from nnunet_diffusion.commands import number_of_cores

    return int(os.environ.get("OMP_NUM_THREADS", number_of_cores())) if device == "cpu" else 1


def train(args: argparse.Namespace, device) -> None:
    """Trains and validates in this process; as nnU-Net's `run_training`, with the device that it is given."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from nnunet_diffusion.model_folder import unwrap
    from nnunet_diffusion.pretraining.start import refuse_misfit

    fold = args.fold if args.fold == "all" else int(args.fold)
    trainer = get_trainer_from_args(
        args.dataset, args.configuration, fold, args.trainer, args.plans, args.c, device=device
    )
    if trainer.is_ddp and "ConfiguredTrainer" not in (base.__name__ for base in type(trainer).__mro__):
        raise UserError(f"-tr {args.trainer}: under torchrun only trainers of nnunet_diffusion know their device")
    trainer.disable_checkpointing = args.disable_checkpointing
    if args.pretrained_weights and not args.val:
        trainer.initialize()
        refuse_misfit(args.pretrained_weights, unwrap(trainer.network))
    final = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    if args.val and not os.path.isfile(final):
        raise UserError(f"--val: there is no {final}: finish that training first, with --c if it was begun")
    maybe_load_checkpoint(trainer, args.c, args.val, args.pretrained_weights)
    torch.backends.cudnn.benchmark = True  # without effect on a CPU
    if not args.val:
        trainer.run_training()
    if args.val_best:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_best.pth"))
    trainer.perform_actual_validation(args.npz)


def train_on_gpus(args: argparse.Namespace) -> None:
    """Trains in one process for each GPU of this machine, which nnU-Net starts."""
    import torch
    from nnunetv2.run.run_training import run_training

    run_training(
        args.dataset, args.configuration, args.fold, args.trainer, args.plans, args.pretrained_weights, args.num_gpus,
        args.npz, args.c, args.val, args.disable_checkpointing, args.val_best, device=torch.device(args.device),
    )  # fmt: skip


def train_as_one_of_many(args: argparse.Namespace) -> None:
    """Trains as one of torchrun's processes: as nnU-Net's `run_ddp`, with the device of this machine's process."""
    import torch
    from torch import distributed

    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device)
    finally:
        distributed.destroy_process_group()
