"""`nnunet_diffusion demo`."""

HELP = "demo"


def add_arguments(parser):
    """Declares the command's arguments."""


def run(args):
    """Runs the command."""
    raise NotImplementedError
