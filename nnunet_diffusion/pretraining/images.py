"""Preprocessed images without their labels, for training that needs none."""

import os
from typing import NamedTuple

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.body import body_locations, in_body, stored_body
from nnunet_diffusion.preprocessing.case_files import open_array, read_preprocessed


class Outside:
    """Labels (1, X, Y, Z) of an image without any, read when indexed: -1 where all channels are 0, else background.

    So nnU-Net marks what is outside a body that was masked when it was normalized, and its augmentation keeps it 0.
    """

    def __init__(self, image):
        self.image, self.shape = image, (1, *image.shape[1:])

    def __getitem__(self, index) -> np.ndarray:
        """Reads a part of them."""
        is_outside = (self.image[(slice(None), *index[1:])] == 0).all(0, keepdims=True)
        return -is_outside.astype(np.int16)


class ImageDataset(nnUNetBaseDataset):
    """Images of the labeled cases and of the pool in one nnU-Net data set; labels are read as all background.

    An identifier is the path of a preprocessed image without `.b2nd`.
    """

    def __init__(self, identifiers: list[str], marks_outside: bool = False):
        """Lists them.

        Args:
            identifiers: Of the images.
            marks_outside: Whether labels are -1 outside the body, see `Outside`.
        """
        super().__init__("", list(identifiers))
        self.marks_outside = marks_outside
        self.finds_body = False  # whether there are locations of the body, as class 1
        self.bodies: dict[str, np.ndarray] = {}  # of the images that were asked for

    def load_case(self, identifier: str) -> tuple:
        """Loads as nnU-Net's `load_case`: image (C, X, Y, Z), labels (1, X, Y, Z), no previous stage, properties."""
        image = open_array(f"{identifier}.b2nd")
        nothing = np.broadcast_to(np.int16(0), (1, *image.shape[1:]))  # takes no memory
        labels = Outside(image) if self.marks_outside else nothing
        return image, labels, None, {"class_locations": {1: self.body(identifier, image)} if self.finds_body else {}}

    def body(self, identifier: str, image) -> np.ndarray:
        """Returns locations in a body; an image that nnU-Net itself preprocessed is searched once."""
        if identifier not in self.bodies:
            stored = stored_body(identifier)
            self.bodies[identifier] = body_locations(image[:1]) if stored is None else stored
        return self.bodies[identifier]

    @staticmethod
    def save_case(data, seg, properties, output_filename_truncated):
        """Refuses to write."""
        raise NotImplementedError("images are written by preprocessing")

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Returns the identifiers of the images in a folder."""
        names = sorted(n for n in os.listdir(folder) if n.endswith(".b2nd") and not n.endswith("_seg.b2nd"))
        return [os.path.join(folder, name.removesuffix(".b2nd")) for name in names if not name.startswith(".")]


class ImageStatistics(NamedTuple):
    """Of preprocessed intensities.

    Attributes:
        spread: (C,) of the body: the median over images of its interquartile range, divided by that of a standard
            normal distribution. On CT it is that of soft tissue and fat; air, bone and metal have no part in it.
        low: The lowest value.
        high: The highest value.
    """

    spread: np.ndarray
    low: float
    high: float


def image_statistics(dataset: ImageDataset, most: int = 30) -> ImageStatistics:
    """Measures some images.

    Args:
        dataset: The images.
        most: How many of them are read, evenly over the data set.

    Raises:
        ValueError: If a channel is zero everywhere.
    """
    chosen = np.unique(np.linspace(0, len(dataset.identifiers) - 1, most).round().astype(int))
    squares, spreads, lows, highs = [], [], [], []
    for index in chosen:
        image = read_preprocessed(f"{dataset.identifiers[index]}.b2nd")
        squares.append(np.square(image, dtype=np.float64).reshape(len(image), -1).mean(1))
        spreads.append([interquartile_deviation(channel) for channel in image])
        lows.append(image.min())
        highs.append(image.max())
    rms, spread = np.sqrt(np.mean(squares, 0)), np.median(spreads, 0)
    if not (np.isfinite(rms).all() and (rms > 0).all()):
        raise ValueError(f"the preprocessed images' root mean square is {rms}: a channel is empty or not finite")
    # A picture whose body is as uniform as air has no spread to go by.
    return ImageStatistics(np.where(spread > 0.01 * rms, spread, rms), float(min(lows)), float(max(highs)))


def interquartile_deviation(image: np.ndarray) -> float:
    """Returns the standard deviation of a normal distribution with the body's interquartile range; 0 without a body."""
    body = image[in_body(image)]
    return float(np.subtract(*np.percentile(body, [75, 25])) / 1.349) if len(body) else 0.0


def refuse_other_channels(dataset: ImageDataset, channels: int) -> None:
    """Raises UserError, naming the image, unless every one has that many channels."""
    for identifier in dataset.identifiers:
        found = dataset.load_case(identifier)[0].shape[0]
        if found != channels:
            raise UserError(
                f"{identifier}.b2nd has {found} channel(s), the labeled images have {channels}: correct the image and "
                "run nnunet_diffusion plan_and_preprocess again, or take it out of dataset.json"
            )


def hold_out(labeled: list[str], pool: list[str], share: float) -> tuple[list[str], list[str]]:
    """Splits images for pre-training on everything: some of the pool (or, without one, of the labeled) stay out.

    Args:
        labeled: Identifiers.
        pool: Identifiers.
        share: Of the pool (or the labeled) that stays out, at least one image; the choice is always the same.

    Returns:
        Images to train on, images held out; a single image is used for both.
    """
    candidates = sorted(pool or labeled)
    if len(labeled) + len(pool) < 2:
        return candidates, candidates
    count = max(1, round(share * len(candidates)))
    held_out = set(np.random.RandomState(1234).choice(candidates, count, replace=False).tolist())
    return [image for image in [*labeled, *pool] if image not in held_out], sorted(held_out)


def image_loader(
    dataset: ImageDataset, batch_size: int, patch_size, sampled_size, label_manager,
    transforms=None, workers: int = 0, pin_memory: bool = False, body_share: float = 0.0,
):  # fmt: skip
    """Returns random patches of images by nnU-Net's own loader.

    Args:
        dataset: The images.
        batch_size: Patches a batch.
        patch_size: Of the patches that come out, in voxels.
        sampled_size: Of the patches before the transforms, at least `patch_size`.
        label_manager: nnU-Net's.
        transforms: nnU-Net's augmentation; None: patches are taken as they are.
        workers: Number of background processes.
        pin_memory: For CUDA.
        body_share: Probability that a patch is centered on the body; a fixed number of a batch of 2 would be 1 or 2.

    Returns:
        An iterator over batches {"data": (B, C, X, Y[, Z]), "target": (B, 1, X, Y[, Z]), background, and outside of
        the scan -1 (nnU-Net's augmentation makes that background, too), "keys": identifiers}.
    """
    dataset.finds_body = body_share > 0
    loader = nnUNetDataLoader(
        dataset, batch_size, sampled_size, patch_size, label_manager, body_share, probabilistic_oversampling=True,
        transforms=transforms,
    )  # fmt: skip
    # An ignore label restricts patches to annotated voxels, which says nothing about images.
    loader.has_ignore = False
    return in_background(loader, workers, 6, pin_memory)


def in_background(loader: nnUNetDataLoader, workers: int, cached: int, pin_memory: bool):
    """Returns an iterator over a loader's batches, which other processes make ahead, as nnU-Net's trainer has it.

    Args:
        loader: nnU-Net's.
        workers: Number of processes; 0: batches are made in this one, when they are asked for.
        cached: How many batches are ready at least.
        pin_memory: For CUDA.
    """
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=workers,
        num_cached=max(cached, workers // 2),
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
    )


def fixed_batches(
    dataset: ImageDataset, number: int, batch_size: int, patch_size, label_manager, seed: int, body_share: float = 0.0
):
    """Yields `number` batches of `image_loader`, of random patches that are always the same, not transformed.

    Leaves numpy's generator, which nnU-Net's loader draws from, as it was.
    """
    loader = image_loader(dataset, batch_size, patch_size, patch_size, label_manager, body_share=body_share)
    state = np.random.RandomState(seed).get_state()
    for _ in range(number):
        before = np.random.get_state()
        np.random.set_state(state)
        batch = next(loader)
        state = np.random.get_state()
        np.random.set_state(before)
        yield batch
