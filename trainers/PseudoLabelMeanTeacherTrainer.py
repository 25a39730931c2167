"""Trains as the mean teacher does, on annotated cases and on those that a round of pseudo labels kept."""

from nnunet_diffusion.trainers.MeanTeacherTrainer import MeanTeacherTrainer
from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer


class PseudoLabelMeanTeacherTrainer(PseudoLabelTrainer, MeanTeacherTrainer):
    """The mean teacher in a round: labels of the round where they are, the averaged network's in the pool's patches.

    Cases with pseudo labels count as labeled: their patches are drawn by what was found there, and boxes of them are
    pasted into the pool, to which they belong as well. Without pseudo labels, as in the fine-tuning at the end of a run
    of rounds, it learns from annotated cases alone.
    """

    def needs_pool(self) -> bool:
        """Tells whether there are pseudo labels."""
        return bool(self.pseudo_labels)

    def is_ready(self) -> bool:
        """Lets the teacher speak as the mean teacher does, if there is a pool."""
        return self.needs_pool() and super().is_ready()
