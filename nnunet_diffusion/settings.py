"""Settings of trainers: class attributes with defaults, overridden by the block `nnunet_diffusion` of plans.json.

A class's block is read as if the class itself had these values: it counts for the classes that derive from it, unless
a nearer one has a value of its own, in its block or in its body.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_type_hints

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import ext_trainer_folders, trainer_names

BLOCK = "nnunet_diffusion"
Rule = Callable[[Any, dict[str, Any]], str]  # of a value and all settings: what it must be, or nothing if it is that
SettingsOf = Callable[[dict, str], dict[str, Any]]  # of plans and the name of a trainer: its settings


def declared(trainer_class: type) -> dict[str, tuple[type, Any]]:
    """Returns the settings of a trainer: every annotated public class attribute of it and its bases.

    Returns:
        {name: (type, default)}, bases first.
    """
    public = {name: kind for name, kind in get_type_hints(trainer_class).items() if not name.startswith("_")}
    return {name: (kind, getattr(trainer_class, name)) for name, kind in public.items() if hasattr(trainer_class, name)}


def chosen(plans: dict, trainer_class: type, others: Collection[type] = ()) -> dict[str, Any]:
    """Returns the settings that plans.json gives for a trainer, checked, as are those for others.

    Args:
        plans: The content of plans.json.
        trainer_class: The trainer.
        others: Further trainers whose settings are checked as well, else found wrong after hours.

    Returns:
        {name: value}, of the declared types.

    Raises:
        UserError: If the block names an unknown trainer or setting, a value has another type than its default, or
            `allowed_values` do not allow it; names the key.
    """
    block = plans.get(BLOCK, {})
    if not isinstance(block, dict) or not all(isinstance(v, dict) for v in block.values()):
        raise UserError(f"plans.json: {BLOCK!r} must be {{trainer name: {{setting: value}}}}, not {block!r}")
    concrete = [trainer_class, *others]
    classes = {cls.__name__: cls for one in concrete for cls in one.__mro__ if declared(cls)}
    if unknown := sorted(set(block) - _names_of_trainers() - set(classes)):
        raise UserError(
            f"plans.json: {BLOCK}.{unknown[0]} is not a trainer; known are "
            f"{sorted(_names_of_trainers() | set(classes))}: correct the name, or add the trainer's folder to "
            "nnUNet_extTrainer"
        )
    block = {name: typed(block[name], cls) for name, cls in classes.items() if name in block}
    given = [nearest(block, one) for one in concrete]
    for one, values in zip(concrete, given, strict=True):
        refuse_forbidden(values, one)
    return {name: value for name, (value, _) in given[0].items()}


def effective(plans: dict, trainer_class: type) -> dict[str, Any]:
    """Returns all settings of a trainer: the plans' where given, else the class's own; for the errors see `chosen`."""
    return _defaults(trainer_class) | chosen(plans, trainer_class)


def given_settings(plans: dict, trainer: str) -> dict[str, Any]:
    """Returns the block that plans give for the name of a trainer, of which nothing else is known."""
    return plans.get(BLOCK, {}).get(trainer, {})


def typed(given: dict[str, Any], trainer_class: type) -> dict[str, Any]:
    """Returns the settings given for a class, of the declared types; for the errors see `chosen`."""
    settings, replaced, values = declared(trainer_class), merged_table(trainer_class, "replaced_settings"), {}
    for name, value in given.items():
        key = f"plans.json: {BLOCK}.{trainer_class.__name__}.{name}"
        if name in replaced:
            raise UserError(f"{key} is no longer a setting: {replaced[name]}")
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
    return values


def nearest(block: dict[str, dict[str, Any]], trainer_class: type) -> dict[str, tuple[Any, str]]:
    """Returns {setting: (value, class whose block gives it)} of a trainer; what a nearer class sets itself is left out.

    Args:
        block: Of plans.json.
        trainer_class: The trainer.
    """
    values: dict[str, tuple[Any, str]] = {}
    for cls in reversed(trainer_class.__mro__):
        for name in vars(cls).get("__annotations__", {}) if cls is not object else ():
            values.pop(name, None)
        values |= {name: (value, cls.__name__) for name, value in block.get(cls.__name__, {}).items()}
    return values


def refuse_forbidden(given: dict[str, tuple[Any, str]], trainer_class: type) -> None:
    """Raises UserError for a setting, given by plans.json or not, that a trainer's rules do not allow beside others."""
    everything = _defaults(trainer_class) | {name: value for name, (value, _) in given.items()}
    for name, rule in merged_table(trainer_class, "allowed_values").items():
        if must_be := rule(everything[name], everything):
            key = f"{BLOCK}.{given.get(name, (None, trainer_class.__name__))[1]}.{name}"
            raise UserError(f"plans.json: {key} is {everything[name]!r}: it must be {must_be}")


def merged_table(trainer_class: type, attribute: str) -> dict[str, Any]:
    """Returns a table, such as `allowed_values`, that a class adds to those of its bases."""
    tables = [vars(cls).get(attribute, {}) for cls in reversed(trainer_class.__mro__)]
    return {name: value for table in tables for name, value in table.items()}


def _defaults(trainer_class: type) -> dict[str, Any]:
    return {name: default for name, (_, default) in declared(trainer_class).items()}


def at_least(low: float) -> Rule:
    """Allows a number that is not smaller."""
    return lambda value, settings: "" if value >= low else f"at least {low}"


def above(low: float) -> Rule:
    """Allows a number that is larger."""
    return lambda value, settings: "" if value > low else f"above {low}"


def between(low: float, high: float) -> Rule:
    """Allows a number in this range, ends included."""
    return lambda value, settings: "" if low <= value <= high else f"{low} to {high}"


def index_of(length: str) -> Rule:
    """Allows a number from 0 on that is smaller than another setting."""
    return lambda value, settings: "" if 0 <= value < settings[length] else f"0 to {settings[length] - 1}"


def one_of(*names: str) -> Rule:
    """Allows one of these names."""
    return lambda value, settings: "" if value in names else " or ".join(names)


def apply(trainer: Any) -> None:
    """Sets all settings of a trainer on the instance; for the errors see `chosen`.

    Defaults must be set too, because nnU-Net's own constructor writes some of the same names.
    """
    for name, value in effective(trainer.plans_manager.plans, type(trainer)).items():
        setattr(trainer, name, value)


def _names_of_trainers() -> set[str]:
    others = {file.stem for folder in ext_trainer_folders() for file in Path(folder).glob("*Trainer.py")}
    return {*trainer_names(), *others}
