"""Trainers that nnU-Net finds through `nnUNet_extTrainer`."""

from contextlib import suppress
from importlib import import_module
from typing import Any

from nnunet_diffusion.installation import trainer_names


def our_trainer(name: str) -> type:
    """Returns one of the trainers that come with the package."""
    return getattr(import_module(f"nnunet_diffusion.trainers.{name}"), name)


def settings_of(plans: dict, name: str) -> dict[str, Any]:
    """Returns all settings of a trainer of ours under these plans; of another one, what the plans give for it."""
    from nnunet_diffusion.settings import effective, given_settings

    return effective(plans, our_trainer(name)) if name in trainer_names() else given_settings(plans, name)


def chosen_settings_of(plans: dict, name: str) -> dict[str, Any]:
    """Returns the settings that plans give a trainer and its bases; plans of an earlier version: the trainer alone."""
    from nnunet_diffusion.errors import UserError
    from nnunet_diffusion.settings import chosen, given_settings

    if name in trainer_names():
        with suppress(UserError):
            return chosen(plans, our_trainer(name))
    return given_settings(plans, name)


def our_trainers() -> list[type]:
    """Returns all of them; the library, which knows no trainer, is given them where it needs them."""
    return [our_trainer(name) for name in trainer_names()]
