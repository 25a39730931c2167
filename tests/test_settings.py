"""Settings of trainers from the plans block."""

import pytest

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.settings import apply, chosen, declared


class BaseTrainer:
    """Stands in for nnU-Net's: sets in its constructor what a class attribute declares."""

    num_epochs: int = 1000

    def __init__(self, block):
        self.num_epochs = 7
        self.plans_manager = type("Plans", (), {"plans": {"nnunet_diffusion": block}})()
        apply(self)


class DerivedTrainer(BaseTrainer):
    num_epochs: int = 30
    weight: float = 2.0
    name: str = "a"
    flag: bool = False
    _private: int = 3


def test_declared_settings_are_annotated_public_attributes_of_the_class_and_its_bases():
    assert declared(DerivedTrainer) == {
        "num_epochs": (int, 30),
        "weight": (float, 2.0),
        "name": (str, "a"),
        "flag": (bool, False),
    }


def test_the_block_wins_over_the_class_and_the_class_over_the_host_constructor():
    assert DerivedTrainer({}).num_epochs == 30
    trainer = DerivedTrainer({"DerivedTrainer": {"num_epochs": 5, "weight": 3, "flag": True}})
    assert (trainer.num_epochs, trainer.weight, trainer.flag, trainer.name) == (5, 3.0, True, "a")
    assert isinstance(trainer.weight, float)


def test_a_block_is_for_its_own_trainer_only():
    block = {"ConfiguredTrainer": {"num_epochs": 5}}
    assert chosen({"nnunet_diffusion": block}, DerivedTrainer) == {}
    assert chosen({}, DerivedTrainer) == {}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"DerivedTrainr": {}}, "nnunet_diffusion.DerivedTrainr is not a trainer; known are .*DerivedTrainer"),
        ({"DerivedTrainer": {"epochs": 5}}, "DerivedTrainer.epochs is not a setting; known are .*num_epochs"),
        ({"DerivedTrainer": {"_private": 5}}, "_private is not a setting"),
        ({"DerivedTrainer": {"num_epochs": "5"}}, "num_epochs is '5', of type str: it must be int"),
        ({"DerivedTrainer": {"num_epochs": 2.5}}, "num_epochs is 2.5, of type float: it must be int"),
        ({"DerivedTrainer": {"flag": 1}}, "flag is 1, of type int: it must be bool"),
        ({"DerivedTrainer": 3}, "must be {trainer name"),
    ],
)
def test_mistakes_are_named(block, message):
    with pytest.raises(UserError, match=message):
        chosen({"nnunet_diffusion": block}, DerivedTrainer)
