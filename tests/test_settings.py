"""Settings of trainers from the plans block."""

import pytest

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.settings import (
    above,
    apply,
    at_least,
    between,
    chosen,
    declared,
    effective,
    index_of,
    merged_table,
    one_of,
)
from nnunet_diffusion.trainers import our_trainers


class BaseTrainer:
    """Stands in for nnU-Net's: sets in its constructor what a class attribute declares."""

    num_epochs: int = 1000
    allowed_values = {"num_epochs": at_least(1)}

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
    allowed_values = {"weight": above(0), "name": one_of("a", "b")}


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


def test_a_block_counts_for_what_derives_from_its_class_unless_a_nearer_class_has_a_value():
    class FarTrainer(DerivedTrainer):
        flag: bool = True

    block = {"BaseTrainer": {"num_epochs": 5}, "DerivedTrainer": {"weight": 7, "flag": True, "name": "b"}}
    plans = {"nnunet_diffusion": block | {"FarTrainer": {"weight": 8.0}}}
    assert chosen(plans, BaseTrainer, [FarTrainer]) == {"num_epochs": 5}
    assert chosen(plans, DerivedTrainer, [FarTrainer]) == {"weight": 7.0, "flag": True, "name": "b"}
    assert chosen(plans, FarTrainer) == {"weight": 8.0, "name": "b"}
    assert effective(plans, FarTrainer) == {"num_epochs": 30, "weight": 8.0, "flag": True, "name": "b"}
    assert chosen({"nnunet_diffusion": {"ConfiguredTrainer": {"num_epochs": 5}}}, DerivedTrainer) == {}
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
        ({"DerivedTrainer": {"num_epochs": 0}}, "DerivedTrainer.num_epochs is 0: it must be at least 1"),
        ({"DerivedTrainer": {"weight": float("nan")}}, "DerivedTrainer.weight is nan: it must be a finite number"),
        ({"DerivedTrainer": {"weight": float("inf")}}, "DerivedTrainer.weight is inf: it must be a finite number"),
        ({"ConfiguredTrainer": {"initial_lr": float("inf")}}, "initial_lr is inf: it must be a finite number"),
        ({"DerivedTrainer": {"name": "c"}}, "DerivedTrainer.name is 'c': it must be a or b"),
        ({"PartialLabelTrainer": {"epochs": 5}}, "nnunet_diffusion.PartialLabelTrainer.epochs is not a setting"),
        ({"DiffusionCoTrainingTrainer": {"perturbation": 0.1}}, "no longer a setting: .* strong_probability instead"),
        ({"PartialLabelTrainer": {"optimizer_name": "Adam"}}, "optimizer_name is 'Adam': it must be SGD or AdamW"),
    ],
)
def test_mistakes_are_named(block, message):
    with pytest.raises(UserError, match=message):
        chosen({"nnunet_diffusion": block}, DerivedTrainer, our_trainers())


def test_ranges_include_what_their_messages_say():
    settings = {"timesteps": 100}
    for rule, inside, outside, message in (
        (at_least(0), [0, 7], [-1], "at least 0"),
        (above(0), [0.1], [0, -1], "above 0"),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1], "0 to 1"),
        (index_of("timesteps"), [0, 99], [-1, 100], "0 to 99"),
    ):
        assert {rule(value, settings) for value in inside} == {""}
        assert {rule(value, settings) for value in outside} == {message}


def test_a_default_that_another_setting_forbids_is_named():
    from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer

    block = {"DenoisingDiffusionTrainer": {"timesteps": 40}}
    with pytest.raises(UserError, match="DenoisingDiffusionTrainer.timestep is 50: it must be 0 to 39"):
        chosen({"nnunet_diffusion": block}, DenoisingDiffusionTrainer)


def test_other_peoples_trainers_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "ForeignTrainer.py").write_text("raise AssertionError")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert chosen({"nnunet_diffusion": {"ForeignTrainer": {"anything": 1}}}, DerivedTrainer) == {}


def test_every_rule_is_for_a_setting_and_allows_its_default():
    for cls in our_trainers():
        assert set(merged_table(cls, "allowed_values")) <= set(declared(cls)), cls
        assert not set(merged_table(cls, "replaced_settings")) & set(declared(cls)), cls
        assert chosen({}, cls) == {}
