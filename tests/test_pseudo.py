"""Pseudo labels: what a prediction adds to annotations, and how it is kept for nnU-Net's loader."""

import errno
import json
import os
import re
import resource

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import Annotation, output_channels
from nnunet_diffusion.rounds import pseudo_labels as pseudo
from nnunet_diffusion.rounds.constrained import (
    NOTHING_ANNOTATED,
    ignore_uncertain,
    keep_labels,
    most_probable,
    possible_classes,
)
from nnunet_diffusion.rounds.pseudo_labels import (
    PseudoLabelDataset,
    ignoring,
    open_pseudo_label,
    pseudo_cases,
    pseudo_folder,
    remove_pseudo_labels,
    save_pseudo_label,
    usable_pseudo_labels,
    with_annotated_share,
    write_array,
)

LABELS = {"background": 0, "liver": 1, "left kidney": 2, "right kidney": 3}
MANAGER = LabelManager(LABELS, None)
CHANNELS = output_channels(MANAGER)
REGIONS = LabelManager({"background": 0, "body": [1, 2], "core": [2]}, [1, 2])


def voxels(*rows):
    """Logits (C, 1, 1, V) from the probabilities of each voxel."""
    return torch.tensor(rows).log().T[:, None, None]


def annotation(*labels, unions=()):
    return Annotation(frozenset({"background", *labels}), unions)


# ---------------------------------------------------------------- what a prediction adds


def test_most_probable_by_hand():
    labels, confidence = most_probable(voxels([0.7, 0.1, 0.1, 0.1], [0.2, 0.1, 0.1, 0.6]), MANAGER)
    assert labels.flatten().tolist() == [0, 3] and labels.dtype == torch.int16
    assert torch.allclose(confidence.flatten(), torch.tensor([0.7, 0.6]))


def test_true_labels_win_by_hand():
    # The liver was annotated. Voxel 0 is liver whatever is predicted. Voxel 1 is not liver: of the rest, 0.1, 0.3 and
    # 0.0, the left kidney has 3/4. Voxel 2 is not liver: 0.6 of 0.8 is background. Voxel 3 is outside the body.
    possible = possible_classes(annotation("liver"), CHANNELS)
    logits = voxels([0.1, 0.1, 0.7, 0.1], [0.1, 0.6, 0.3, 1e-9], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1])
    labels, confidence = most_probable(logits, MANAGER, torch.tensor([[[1, 0, 0, -1]]]), possible)
    assert labels.flatten().tolist() == [1, 2, 0, -1]
    assert torch.allclose(confidence.flatten(), torch.tensor([1.0, 0.75, 0.75, 1.0]))


def test_a_union_is_divided_and_nothing_else_is_one_of_it():
    # "Some kidney" has the value 2; the liver was not annotated.
    known = annotation(unions=(("left kidney", "right kidney"),))
    logits = voxels([0.8, 0.1, 0.025, 0.075], [0.1, 0.2, 0.35, 0.35])
    labels, confidence = most_probable(logits, MANAGER, torch.tensor([[[2, 0]]]), possible_classes(known, CHANNELS))
    assert labels.flatten().tolist() == [3, 1]
    assert torch.allclose(confidence.flatten(), torch.tensor([0.75, 2 / 3]))


def test_completion_equals_bayes_rule_voxel_by_voxel():
    # The slow second route: for every voxel the classes that the label file allows, in plain Python.
    rng = np.random.default_rng(0)
    known = annotation("liver", unions=(("left kidney", "right kidney"),))
    true = torch.tensor(rng.choice([-1, 0, 1, 2], (3, 4, 5)))
    logits = torch.tensor(rng.normal(size=(4, 3, 4, 5)))
    labels, confidence = most_probable(logits, MANAGER, true, possible_classes(known, CHANNELS))
    allowed = {-1: None, 0: [0], 1: [1], 2: [2, 3]}
    for index in np.ndindex(3, 4, 5):
        classes = allowed[int(true[index])]
        p = logits[(slice(None), *index)].softmax(0)
        if classes is None:
            assert labels[index] == -1
            continue
        best = max(classes, key=lambda c: p[c])
        assert labels[index] == best
        assert confidence[index] == pytest.approx(float(p[best] / sum(p[c] for c in classes)), abs=1e-5)


def test_with_everything_annotated_the_label_file_comes_back():
    true = torch.randint(-1, 4, (2, 3, 4))
    possible = possible_classes(annotation("liver", "left kidney", "right kidney"), CHANNELS)
    labels, confidence = most_probable(torch.randn(4, 2, 3, 4), MANAGER, true, possible)
    assert torch.equal(labels, true.to(torch.int16)) and (confidence == 1).all()


def test_an_ignored_voxel_of_the_label_file_stays_ignored():
    manager = LabelManager({**LABELS, "ignore": 4}, None)
    possible = possible_classes(annotation("liver"), output_channels(manager))
    labels, confidence = most_probable(torch.randn(4, 1, 1, 2), manager, torch.tensor([[[4, 1]]]), possible)
    assert labels.flatten().tolist() == [4, 1] and (confidence == 1).all()


def test_regions_by_hand_and_their_completion_is_refused():
    logits = torch.logit(torch.tensor([[0.9, 0.8, 0.3], [0.2, 0.6, 0.1]]))[:, None, None]
    labels, confidence = most_probable(logits, REGIONS)
    assert labels.flatten().tolist() == [1, 2, 0]
    assert torch.allclose(confidence.flatten(), torch.tensor([0.8, 0.6, 0.7]))
    with pytest.raises(NotImplementedError, match="regions"):
        most_probable(logits, REGIONS, torch.zeros(1, 1, 3), torch.ones(3, 2, dtype=torch.bool))


def test_uncertain_voxels_are_ignored_but_not_those_outside_the_body():
    labels, confidence = torch.tensor([[[-1, 0, 1, 2]]]), torch.tensor([[[0.1, 0.4, 0.5, 0.9]]])
    assert ignore_uncertain(labels, confidence, 0.5, 4).flatten().tolist() == [-1, 4, 1, 2]


def test_labels_that_are_not_believed_are_taken_back():
    labels = torch.tensor([[[-1, 0, 1, 2, 3, 4]]], dtype=torch.int16)  # 4 is ignored
    kept, known = keep_labels(labels, {"liver", "right kidney"}, NOTHING_ANNOTATED, CHANNELS)
    assert kept.flatten().tolist() == [-1, 0, 1, 0, 3, 4]
    assert known == annotation("liver", "right kidney")
    unions = (("left kidney", "right kidney"),)
    kept, known = keep_labels(labels, {"right kidney"}, annotation("liver", unions=unions), CHANNELS)
    assert kept.flatten().tolist() == [-1, 0, 1, 2, 2, 4] and known == annotation("liver", unions=unions)
    kept, known = keep_labels(labels, {"left kidney", "right kidney"}, annotation("liver", unions=unions), CHANNELS)
    assert torch.equal(kept, labels) and known == annotation("liver", "left kidney", "right kidney")


def test_regions_that_are_not_believed_leave_the_label_map():
    labels = torch.tensor([[[0, 1, 2]]])
    kept, known = keep_labels(labels, {"body"}, NOTHING_ANNOTATED, output_channels(REGIONS))
    assert torch.equal(kept, labels) and known == Annotation(frozenset({"body"}))


# ---------------------------------------------------------------- how it is kept


@pytest.fixture
def label_map():
    rng = np.random.default_rng(1)
    segmentation = rng.choice([-1, 0, 1, 3, 4], (5, 12, 14)).astype(np.int16)  # no left kidney; 4 is ignored
    return segmentation


def test_a_pseudo_label_comes_back(tmp_path, label_map):
    known = annotation("liver", unions=(("left kidney", "right kidney"),))
    info = {"u": 0.5, "why": ["x"]}
    save_pseudo_label(tmp_path / "new", "a.b", label_map, known, ignoring(MANAGER), (8, 8), None, info)
    label = open_pseudo_label(tmp_path / "new", "a.b")
    assert np.array_equal(label.segmentation[:], label_map[None])
    assert label.annotation == known and label.completes is None and label.info == info
    assert set(label.class_locations) == {1, 2, 3} and len(label.class_locations[2]) == 0
    found = {tuple(voxel) for voxel in label.class_locations[1]}
    assert found == {(0, *map(int, voxel)) for voxel in np.argwhere(label_map == 1)}
    assert pseudo_cases(tmp_path / "new") == ["a.b"] and pseudo_cases(tmp_path / "none") == []


def test_locations_of_annotated_voxels_and_regions_keep_their_keys(tmp_path, label_map):
    manager = LabelManager({**LABELS, "ignore": 4}, None)
    save_pseudo_label(tmp_path, "a", label_map, NOTHING_ANNOTATED, manager, (8, 8))
    locations = open_pseudo_label(tmp_path, "a").class_locations
    known = {tuple(voxel[1:]) for voxel in locations[(-1, 0, 1, 2, 3)].tolist()}
    assert known == {tuple(map(int, voxel)) for voxel in np.argwhere(label_map < 4)}
    save_pseudo_label(tmp_path, "a", label_map.clip(-1, 2), Annotation(frozenset({"body"})), REGIONS, (8, 8))
    assert set(open_pseudo_label(tmp_path, "a").class_locations) == {(1, 2), (2,)}


def test_a_damaged_or_foreign_file_is_named(tmp_path, label_map):
    save_pseudo_label(tmp_path, "a", label_map, NOTHING_ANNOTATED, MANAGER, (8, 8))
    path = tmp_path / "a_seg.b2nd"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="a_seg.b2nd:? is damaged"):
        open_pseudo_label(tmp_path, "a")
    blosc2.asarray(label_map, urlpath=str(tmp_path / "b_seg.b2nd"))
    with pytest.raises(UserError, match="b_seg.b2nd is damaged, or no file of nnunet_diffusion"):
        open_pseudo_label(tmp_path, "b")


ABOUT = {"annotation": {"labels": [], "unions": []}, "completes": None, "info": {}, "classes": []}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (["{"], "is no pseudo label"),
        (5, "is no pseudo label"),
        ([], "is no pseudo label"),
        (["[]"], "the whole file: "),
        (['{"annotation": {"labels": ["liver"]}}'], "annotation.unions: Field required"),
        ([json.dumps({**ABOUT, "completes": 5})], "completes: .* not 5"),
        ([json.dumps({**ABOUT, "classes": [1]})], "classes: has 1 for 0 lists of voxels"),
        ([json.dumps(ABOUT), b"xyz"], "is no pseudo label"),
    ],
)  # fmt: skip
def test_what_a_pseudo_label_lacks_is_named(tmp_path, label_map, metadata, message):
    write_array(str(tmp_path / "a_seg.b2nd"), label_map[None], (8, 8), metadata)
    with pytest.raises(UserError, match=f"a_seg.b2nd: {message}.*: remove it and run the command that made it again"):
        open_pseudo_label(tmp_path, "a")


def test_only_pseudo_labels_of_this_program_are_removed(tmp_path, label_map):
    for case, info in (("ours", {"teacher": "t"}), ("mine", {})):
        save_pseudo_label(tmp_path, case, label_map, NOTHING_ANNOTATED, ignoring(MANAGER), (8, 8), None, info)
    with pytest.raises(UserError, match="mine_seg.b2nd: was not made by nnunet_diffusion, which does not remove it"):
        remove_pseudo_labels(str(tmp_path), ["ours", "mine"])
    assert pseudo_cases(str(tmp_path)) == ["mine", "ours"]
    remove_pseudo_labels(str(tmp_path), ["ours"])
    assert pseudo_cases(str(tmp_path)) == ["mine"]


def test_more_pseudo_labels_than_files_may_be_open_are_read(tmp_path, label_map):
    save_pseudo_label(tmp_path, "a", label_map, NOTHING_ANNOTATED, ignoring(MANAGER), (8, 8))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    for i in range(60):
        os.link(tmp_path / "a_seg.b2nd", tmp_path / f"a{i}_seg.b2nd")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
        assert len(usable_pseudo_labels(tmp_path, {})) == 61
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left", "/x/.tmp1_a"), RuntimeError("No space left")])
def test_a_full_disk_is_named_with_a_remedy_and_leaves_the_former_label(tmp_path, label_map, monkeypatch, error):
    """In the middle of the file; blosc2 itself raises a RuntimeError."""
    save_pseudo_label(tmp_path, "a", label_map, NOTHING_ANNOTATED, MANAGER, (8, 8))

    def write_half(array, urlpath, **_):
        open(urlpath, "wb").write(b"half")
        raise error

    monkeypatch.setattr(pseudo.blosc2, "asarray", write_half)
    folder = re.escape(str(tmp_path))
    says = rf"^a_seg.b2nd was not written to {folder}, where \d+ MB are free: No space left; make room"
    with pytest.raises(OSError, match=says) as raised:
        save_pseudo_label(tmp_path, "a", label_map * 0, NOTHING_ANNOTATED, MANAGER, (8, 8))
    assert "run the same command again" in str(raised.value) and ".tmp" not in str(raised.value)
    assert np.array_equal(open_pseudo_label(tmp_path, "a").segmentation[0], label_map)
    assert os.listdir(tmp_path) == ["a_seg.b2nd"]


@pytest.mark.parametrize("name", ["../x", "..", "a/b", ""])
def test_names_do_not_escape_their_folder(tmp_path, label_map, name):
    with pytest.raises(UserError, match="cannot be"):
        pseudo_folder(str(tmp_path), "id", "run", name)
    with pytest.raises(UserError, match="cannot be"):
        save_pseudo_label(tmp_path, name, label_map, NOTHING_ANNOTATED, MANAGER, (8, 8))
    assert pseudo_folder("base", "id", "run", "round_1") == os.path.join("base", "id_pseudo", "run", "round_1")


def test_a_pseudo_label_yields_to_annotations_that_it_does_not_complete(tmp_path, label_map):
    unions = (("left kidney", "right kidney"),)
    completed = {"pool": None, "partial": annotation("liver"), "union": annotation(unions=unions)}
    for case, completes in completed.items():
        save_pseudo_label(tmp_path, case, label_map, annotation("liver"), ignoring(MANAGER), (8, 8), completes)
    now = {"partial": annotation("liver"), "union": annotation(unions=unions)}
    assert set(usable_pseudo_labels(tmp_path, now)) == {"pool", "partial", "union"}
    later = {"pool": annotation("liver"), "partial": annotation("liver", "left kidney"), "union": annotation()}
    assert usable_pseudo_labels(tmp_path, later) == {}


def test_at_least_a_share_of_what_is_drawn_is_annotated():
    cases, annotated = ["a", "b", *(f"p{i}" for i in range(30))], {"a", "b"}
    drawn = with_annotated_share(cases, annotated, 0.5)
    assert sum(case in annotated for case in drawn) / len(drawn) == pytest.approx(0.5)
    assert len({drawn.count(case) for case in cases[2:]}) == 1 and drawn.count("a") == drawn.count("b")
    assert with_annotated_share(cases, set(cases[:20]), 0.5) == cases, "there are more than enough"
    assert with_annotated_share(cases, set(), 0.5) == with_annotated_share(cases, annotated, 0.0) == cases
    with pytest.raises(UserError, match="annotated_share is 1"):
        with_annotated_share(cases, annotated, 1.0)


# ---------------------------------------------------------------- what trains on it


@pytest.fixture
def folders(tmp_path, label_map):
    """An annotated case, a pool of one, and pseudo labels of both: the annotated one's is the completed."""
    image, true = np.random.default_rng(2).normal(size=(1, 5, 12, 14)).astype(np.float32), label_map[None].clip(-1, 3)
    for folder in ("annotated", "pool", "pseudo"):
        (tmp_path / folder).mkdir()
    properties = {"class_locations": pseudo.class_locations(true, MANAGER)}
    for case in ("full", "partial"):
        path = str(tmp_path / "annotated" / case)
        nnUNetDatasetBlosc2.save_case(image, true, properties, path, (1, 1, 12, 14), (1, 1, 8, 8))
    blosc2.asarray(image + 1, urlpath=str(tmp_path / "pool" / "new.b2nd"))
    for case in ("partial", "new"):
        save_pseudo_label(tmp_path / "pseudo", case, label_map, annotation("liver"), ignoring(MANAGER), (8, 8))
    return tmp_path


def dataset(folders):
    annotated = nnUNetDatasetBlosc2(str(folders / "annotated"), ["full", "partial"])
    images = {"new": str(folders / "pool"), "partial": str(folders / "annotated")}
    return PseudoLabelDataset(annotated, images, str(folders / "pseudo"))


def test_the_data_set_serves_true_and_pseudo_labels(folders, label_map):
    cases = dataset(folders)
    assert cases.identifiers == ["full", "new", "partial"]
    loaded = {case: cases.load_case(case) for case in cases.identifiers}
    assert loaded["full"][1][:].max() == 3
    for case in ("new", "partial"):
        image, segmentation, previous, properties = loaded[case]
        assert np.array_equal(segmentation[:], label_map[None]) and previous is None
        assert set(properties["class_locations"]) == {1, 2, 3}
    assert np.array_equal(loaded["new"][0][:], loaded["full"][0][:] + 1)
    assert np.array_equal(loaded["partial"][0][:], loaded["full"][0][:])


@pytest.mark.parametrize("patch", [(8, 8), (4, 8, 8)])
def test_nnunets_loader_draws_from_it_without_a_declared_ignore_label(folders, patch):
    loader = nnUNetDataLoader(dataset(folders), 6, patch, patch, ignoring(MANAGER), oversample_foreground_percent=0.5)
    drawn = [next(loader) for _ in range(8)]
    keys = {str(key) for batch in drawn for key in batch["keys"]}
    assert keys == {"full", "new", "partial"}
    values = {key: torch.cat([b["target"][i].flatten() for b in drawn for i, k in enumerate(b["keys"]) if k == key])
              for key in keys}  # fmt: skip
    assert (values["new"] == 4).any() and not (values["full"] == 4).any()


def test_a_declared_ignore_label_stays_and_else_the_next_value_is_ignored():
    declared = LabelManager({**LABELS, "ignore": 4}, None)
    assert ignoring(declared) is declared
    for manager, value in ((MANAGER, 4), (REGIONS, 3)):
        new = ignoring(manager)
        assert new.ignore_label == value and manager.ignore_label is None
        assert new.num_segmentation_heads == manager.num_segmentation_heads
        assert new.all_labels == manager.all_labels and new.foreground_labels == manager.foreground_labels
        assert not new.has_ignore_label and ignoring(new).ignore_label == value


def test_ignored_voxels_have_no_gradient():
    loss = DC_and_CE_loss({"batch_dice": False, "do_bg": False}, {}, ignore_label=ignoring(MANAGER).ignore_label)
    logits = torch.randn(1, 4, 4, 4, requires_grad=True)
    target = torch.randint(0, 5, (1, 1, 4, 4))
    loss(logits, target).backward()
    is_ignored = (target == 4).expand_as(logits)
    assert is_ignored.any() and (logits.grad[is_ignored] == 0).all() and (logits.grad[~is_ignored] != 0).any()
