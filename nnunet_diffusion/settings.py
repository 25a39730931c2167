"""Settings of trainers: class attributes with defaults, overridden by the block `nnunet_diffusion` of plans.json."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import ext_trainer_folders, trainer_names

BLOCK = "nnunet_diffusion"
Rule = Callable[[Any, dict[str, Any]], str]  # of a value and all settings: what it must be, or nothing if it is that


def declared(trainer_class: type) -> dict[str, tuple[type, Any]]:
    """The settings of a trainer: every annotated public class attribute of it and its bases.

    Returns:
        {name: (type, default)}, bases first.
    """
    hints = {}
    for cls in reversed(trainer_class.__mro__):
        own = vars(cls).get("__annotations__", {}) if cls is not object else {}
        hints.update({name: cls for name in own if not name.startswith("_") and hasattr(cls, name)})
    types = get_type_hints(trainer_class)
    return {name: (types[name], getattr(trainer_class, name)) for name in hints}


def chosen(plans: dict, trainer_class: type) -> dict[str, Any]:
    """The settings that plans.json gives for a trainer, checked, as are those for our other trainers.

    Args:
        plans: The content of plans.json.
        trainer_class: A block that bears its name applies, those of its bases do not.

    Returns:
        {name: value}, of the declared types.

    Raises:
        UserError: If the block names an unknown trainer or setting, a value has another type than its default, or the
            trainer's `allowed_values` do not allow it.
    """
    block = plans.get(BLOCK, {})
    if not isinstance(block, dict) or not all(isinstance(v, dict) for v in block.values()):
        raise UserError(f"plans.json: {BLOCK!r} must be {{trainer name: {{setting: value}}}}, not {block!r}")
    for name in sorted(set(block) - _known_trainers(trainer_class)):
        raise UserError(
            f"plans.json: {BLOCK}.{name} is not a trainer; known are {sorted(_known_trainers(trainer_class))}: "
            "correct the name, or add the trainer's folder to nnUNet_extTrainer"
        )
    for name in sorted(set(block) & set(trainer_names()) - {trainer_class.__name__}):  # else found after hours
        checked(block[name], our_trainer(name))
    return checked(block.get(trainer_class.__name__, {}), trainer_class)


def our_trainer(name: str) -> type:
    """One of the trainers that come with the package."""
    return getattr(import_module(f"nnunet_diffusion.trainers.{name}"), name)


def effective(plans: dict, trainer_class: type) -> dict[str, Any]:
    """All settings of a trainer: the plans' where given, else the class's own defaults; for the errors see `chosen`."""
    return {name: default for name, (_, default) in declared(trainer_class).items()} | chosen(plans, trainer_class)


def checked(given: dict[str, Any], trainer_class: type) -> dict[str, Any]:
    """The settings given for a trainer, of the declared types; for the errors see `chosen`."""
    settings = declared(trainer_class)
    values = {}
    for name, value in given.items():
        key = f"plans.json: {BLOCK}.{trainer_class.__name__}.{name}"
        if name not in settings:
            raise UserError(f"{key} is not a setting; known are {sorted(settings)}: correct or remove it")
        kind = settings[name][0]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{key} is {value!r}, of type {type(value).__name__}: it must be {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise UserError(f"{key} is {value!r}: it must be a finite number")
        values[name] = value
    everything = {name: default for name, (_, default) in settings.items()} | values
    for name, rule in allowed(trainer_class).items():
        if must_be := rule(everything[name], everything):
            key = f"plans.json: {BLOCK}.{trainer_class.__name__}.{name}"
            raise UserError(f"{key} is {everything[name]!r}: it must be {must_be}")
    return values


def allowed(trainer_class: type) -> dict[str, Rule]:
    """The rules for the values of a trainer's settings: `allowed_values` of it and its bases."""
    rules = {}
    for cls in reversed(trainer_class.__mro__):
        rules.update(vars(cls).get("allowed_values", {}))
    return rules


def at_least(low: float) -> Rule:
    """A number that is not smaller."""
    return lambda value, settings: "" if value >= low else f"at least {low}"


def above(low: float) -> Rule:
    """A number that is larger."""
    return lambda value, settings: "" if value > low else f"above {low}"


def between(low: float, high: float) -> Rule:
    """A number in this range, ends included."""
    return lambda value, settings: "" if low <= value <= high else f"{low} to {high}"


def index_of(length: str) -> Rule:
    """A number from 0 on that is smaller than another setting."""
    return lambda value, settings: "" if 0 <= value < settings[length] else f"0 to {settings[length] - 1}"


def one_of(*names: str) -> Rule:
    """One of these names."""
    return lambda value, settings: "" if value in names else " or ".join(names)


def apply(trainer: Any) -> None:
    """Sets all settings of a trainer, see `effective`, on the instance.

    Defaults must be set too, because nnU-Net's own constructor writes some of the same names.
    """
    for name, value in effective(trainer.plans_manager.plans, type(trainer)).items():
        setattr(trainer, name, value)


def _known_trainers(trainer_class: type) -> set[str]:
    others = {file.stem for folder in ext_trainer_folders() for file in Path(folder).glob("*Trainer.py")}
    return {*trainer_names(), *others, trainer_class.__name__}
