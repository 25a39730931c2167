"""The command `nnunet_diffusion`: one file a subcommand, parsed before anything heavy is imported.

Such a file has HELP (one line), add_arguments(parser), run(args) -> exit code and, where nnU-Net's folders must be set,
NEEDS: their names.
"""

import argparse
import importlib
import sys

from nnunet_diffusion import __version__
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import require_folders

COMMANDS = ("env", "convert", "plan_and_preprocess", "demo", "export", "evaluate", "train", "rounds")
COMMANDS += ("mutual", "sample", "evaluate_samples", "report")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands in milliseconds: they import torch and nnU-Net only in `run`."""
    parser = argparse.ArgumentParser(
        prog="nnunet_diffusion",
        description="Learn nnU-Net's planned network from every scan there is.",
        epilog='example:\n  eval "$(nnunet_diffusion env --root ~/nnunet)"\n  nnunet_diffusion COMMAND --help',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnunet_diffusion {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"nnunet_diffusion.cli.{name}")
        command = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, needs=getattr(module, "NEEDS", ()))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 all went well, 1 something did not, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        require_folders(args.needs)
        return args.run(args)
    except (UserError, OSError) as error:
        end_progress_bars()
        print(f"nnunet_diffusion: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        end_progress_bars()
        print("nnunet_diffusion: interrupted", file=sys.stderr)
        return 130


def end_progress_bars() -> None:
    """Lets what is printed next begin on a line of its own: an error leaves a bar's line as it stands."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()
