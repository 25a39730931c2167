"""The command line of conversions: of `nnunet_diffusion convert`, and of the scripts of published data sets."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from nnunet_diffusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser, dataset_id: int | None = None, name: str | None = None) -> None:
    """Declares what every conversion takes.

    Args:
        parser: Of the conversion.
        dataset_id: The default of a published data set, which lies in one folder; None: it must be given, as the name.
        name: The default.
    """
    if name:
        parser.add_argument("source", metavar="SOURCE", help="the folder that the data set was unpacked into")
    told, is_due = (" (default: %(default)s)", False) if name else ("", True)
    id_told, name_told = f"data set id, 1 to 999{told}", f"name of the data set{told}"
    parser.add_argument(
        "-d", dest="dataset_id", metavar="ID", type=int, default=dataset_id, required=is_due, help=id_told
    )
    parser.add_argument("-n", dest="name", metavar="NAME", default=name, required=is_due, help=name_told)
    parser.add_argument("--copy", action="store_true", help="copy the files in, instead of referring to where they are")
    parser.add_argument(
        "-np", dest="num_threads", type=int, default=4, metavar="N", help="checks at a time (default: 4)"
    )


def tell(converted: Any) -> int:
    """Prints what a conversion did; returns the exit code, 1 if unlabeled scans had to be left out."""
    print(converted, file=sys.stderr if converted.skipped else sys.stdout)
    for warning in converted.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return int(bool(converted.skipped))


def command_line(convert_set: Callable[..., Any], description: str | None, **choices: tuple[int, ...]) -> int:
    """Runs a conversion from the command line, with the defaults of its signature; returns the exit code.

    Args:
        convert_set: Takes source, dataset_id, name, copy, num_threads and the names of `choices`.
        description: For --help.
        **choices: Options of its own and their values.
    """
    import inspect  # not needed for --help

    defaults = {key: parameter.default for key, parameter in inspect.signature(convert_set).parameters.items()}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, defaults["dataset_id"], defaults["name"])
    for option, values in choices.items():
        parser.add_argument(f"--{option}", type=int, choices=values, help="where the files do not tell")
    try:
        return tell(convert_set(**vars(parser.parse_args())))
    except (UserError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
