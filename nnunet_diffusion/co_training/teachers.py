"""Teachers of a student network: what each method of semi-supervised training learns from a batch.

A step is two losses, each a function of the student, the teacher and one batch: `labeled` and `unlabeled`. The
student is called as the function that it is; whoever trains it decides how it is wrapped and optimized.
"""

from collections.abc import Callable

from torch import Tensor, nn

from nnunet_diffusion.co_training.losses import Output, labeled_loss, unlabeled_loss
from nnunet_diffusion.co_training.mask_diffusion import MaskDiffusion, draw_rounds
from nnunet_diffusion.pretraining.diffusion import Diffusion

SupervisedLoss = Callable[[Output], Tensor]
Student = Callable[[Tensor], Output]


class Teacher(nn.Module):
    """None at all: supervised training, the base of the others."""

    needs_pool = False

    def labeled(self, student: Student, images: Tensor, supervised_loss: SupervisedLoss) -> Tensor:
        """Computes the loss of a labeled batch; `supervised_loss` is that of an output on the labels."""
        return supervised_loss(student(images))

    def unlabeled(self, student: Student, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of a batch without labels, and (B,) figures of its images to report."""
        raise NotImplementedError


class CrossPseudo(Teacher):
    """A second network that starts from other weights; each learns the other's pseudo labels (Chen et al. 2021).

    Args:
        network: The teacher.
        gate: See `co_training.losses.unlabeled_loss`.
        batch_dice: As in the plan's configuration.
    """

    needs_pool = True

    def __init__(self, network: nn.Module, gate: float, batch_dice: bool):
        super().__init__()
        self.network = network
        self.gate, self.batch_dice = gate, batch_dice

    def masks(self, images: Tensor) -> tuple[list[Output], list[Tensor]]:
        """Returns logits of its masks, the first for the student, and errors that it learns from by itself."""
        return [self.network(images)], []

    def labeled(self, student, images, supervised_loss):
        """Lets both learn the labels."""
        return labeled_loss(student(images), *self.masks(images), supervised_loss)

    def unlabeled(self, student, images):
        """Lets both learn from each other."""
        masks, errors = self.masks(images)
        masks = [finest(mask) for mask in masks]
        loss, agreed = unlabeled_loss(finest(student(images)), masks, errors, self.gate, self.batch_dice)
        return loss, {"agreement": agreed}


class DiffusionTeacher(CrossPseudo):
    """Mask pathway and image pathway, with rounds of refinement: see `co_training.mask_diffusion`.

    Args:
        network: Both.
        gate: As in CrossPseudo.
        batch_dice: As in CrossPseudo.
        diffusion: The process.
        classes: Background included.
        rounds: K.
        chained: Whether a round goes on from the one before.
        is_detached: Whether masks are constants to R, and restored images to S.
    """

    def __init__(
        self, network: MaskDiffusion, gate: float, batch_dice: bool, diffusion: Diffusion, classes: int, rounds: int,
        chained: bool, is_detached: bool = True,
    ):  # fmt: skip
        super().__init__(network, gate, batch_dice)
        self.diffusion = diffusion
        self.classes, self.rounds, self.chained, self.is_detached = classes, rounds, chained, is_detached

    def masks(self, images):
        """Returns the first mask and those of the rounds, with fresh draws."""
        draws = draw_rounds(images, self.classes, self.rounds, len(self.diffusion.alpha_bar))
        return self.network.refine(images, draws, self.diffusion, self.chained, self.is_detached)


def finest(output: Output) -> Tensor:
    """Returns the output of full resolution of a network with or without deep supervision."""
    return output[0] if isinstance(output, (list, tuple)) else output
