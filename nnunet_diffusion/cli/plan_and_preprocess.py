"""`nnunet_diffusion plan_and_preprocess`."""

HELP = "plan_and_preprocess"


def add_arguments(parser):
    """Declares the command's arguments."""


def run(args):
    """Runs the command."""
    raise NotImplementedError
