"""Settings of trainers: class attributes with defaults, overridden by the block `nnunet_diffusion` of plans.json."""

from pathlib import Path
from typing import Any, get_type_hints

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import ext_trainer_folders, trainer_names

BLOCK = "nnunet_diffusion"


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
    """The settings that plans.json gives for a trainer, checked.

    Args:
        plans: The content of plans.json.
        trainer_class: A block that bears its name applies, those of its bases do not.

    Returns:
        {name: value}, of the declared types.

    Raises:
        UserError: If the block names an unknown trainer or setting, or a value has another type than its default.
    """
    block = plans.get(BLOCK, {})
    if not isinstance(block, dict) or not all(isinstance(v, dict) for v in block.values()):
        raise UserError(f"plans.json: {BLOCK!r} must be {{trainer name: {{setting: value}}}}, not {block!r}")
    for name in sorted(set(block) - _known_trainers(trainer_class)):
        raise UserError(
            f"plans.json: {BLOCK}.{name} is not a trainer; known are {sorted(_known_trainers(trainer_class))}: "
            "correct the name, or add the trainer's folder to nnUNet_extTrainer"
        )
    settings = declared(trainer_class)
    values = {}
    for name, value in block.get(trainer_class.__name__, {}).items():
        key = f"plans.json: {BLOCK}.{trainer_class.__name__}.{name}"
        if name not in settings:
            raise UserError(f"{key} is not a setting; known are {sorted(settings)}: correct or remove it")
        kind = settings[name][0]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{key} is {value!r}, of type {type(value).__name__}: it must be {kind.__name__}")
        values[name] = value
    return values


def apply(trainer: Any) -> None:
    """Sets all settings of a trainer on the instance: the plans' where given, else the class's own defaults.

    Defaults must be set too, because nnU-Net's own constructor writes some of the same names.
    """
    cls = type(trainer)
    values = {name: default for name, (_, default) in declared(cls).items()}
    values.update(chosen(trainer.plans_manager.plans, cls))
    for name, value in values.items():
        setattr(trainer, name, value)


def _known_trainers(trainer_class: type) -> set[str]:
    others = {file.stem for folder in ext_trainer_folders() for file in Path(folder).glob("*Trainer.py")}
    return {*trainer_names(), *others, trainer_class.__name__}
