"""`nnunet_diffusion env`: the shell variables that nnU-Net needs, and a check of the installation."""

import argparse
import os
import shlex
import sys

from nnunet_diffusion import checkup, installation
from nnunet_diffusion.installation import EXT_TRAINER, FOLDERS, WAIT_POLICY

HELP = "Print the shell exports that nnU-Net needs to find this plug-in and its data, or check the installation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--root", metavar="FOLDER", help="put nnU-Net's three folders in FOLDER, and create them")
    parser.add_argument("--check", action="store_true", help="say what is wrong and how to mend it")
    parser.epilog = (
        "example:\n"
        '  eval "$(nnunet_diffusion env --root ~/nnunet)"   set this shell up; the line also suits ~/.bashrc\n'
        "  nnunet_diffusion env --check"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the exports, or the findings of the check."""
    if args.root is not None:
        os.environ.update({name: os.path.join(os.path.abspath(args.root), name) for name in FOLDERS})
        for name in FOLDERS:
            os.makedirs(os.environ[name], exist_ok=True)
    return print_findings() if args.check else print_exports()


def print_exports() -> int:
    """Prints one export a line, quoted for the shell; what is not set is told on stderr, which `eval` does not see."""
    values = {EXT_TRAINER: installation.with_our_trainers(installation.ext_trainer_folders())}
    for name in FOLDERS:
        if os.environ.get(name):
            values[name] = os.environ[name]
        else:
            print(f"nnunet_diffusion: {name} is not set: give --root FOLDER, or export it yourself", file=sys.stderr)
    if not installation.may_have_gpu():  # spinning threads make training slow as soon as another program runs
        values[WAIT_POLICY] = os.environ.get(WAIT_POLICY) or "passive"
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def print_findings() -> int:
    """Prints what the check finds, as it finds it; returns 1 if anything is wrong."""
    problems = 0
    for finding in checkup.check():
        print(f"{'ok' if finding.is_ok else 'PROBLEM':9}{finding.text}", flush=True)
        problems += not finding.is_ok
    print(f"{problems} problems" if problems != 1 else "1 problem")
    return int(problems > 0)
