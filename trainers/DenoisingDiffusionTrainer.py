"""Pre-trains the planned network on every image of the data set, labeled or not, by denoising diffusion."""

import itertools
from time import time

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.optimization import WarmupPolyLR, adamw, warming_ema
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers
from nnunet_diffusion.pretraining import pictures
from nnunet_diffusion.pretraining.conditioning import condition
from nnunet_diffusion.pretraining.denoiser_file import plan_identity, save_denoiser
from nnunet_diffusion.pretraining.diffusion import Diffusion
from nnunet_diffusion.pretraining.draw import draw_images
from nnunet_diffusion.pretraining.images import ImageDataset, fixed_batches, hold_out, image_loader, image_statistics
from nnunet_diffusion.pretraining.process import PREDICTIONS, SCHEDULES, WEIGHTINGS, draw_timesteps, held_out_draw
from nnunet_diffusion.settings import above, at_least, between, index_of, one_of
from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer


class DenoisingDiffusionTrainer(ConfiguredTrainer):
    """Denoising diffusion (Ho et al. 2020) with the very network that nnU-Net planned; writes `denoiser.pth`.

    Fold k leaves fold k's validation images out; fold `all` leaves a small share of the pool out. On these the loss is
    measured, at fixed timesteps and noise, with the averaged weights. Pre-training on unlabeled slices is Huang et
    al. 2024 (arXiv 2402.15216), abstract; conditioning through the norms, and folding, are ours.
    """

    num_val_iterations_per_epoch: int = 10  # held-out batches, always the same
    initial_lr: float = 3e-4  # AdamW
    weight_decay: float = 1e-4
    warmup_epochs: int = 5  # of a learning rate that rises from 0
    seed: int = 0
    schedule: str = "linear"  # or cosine, sigmoid
    timesteps: int = 1000  # noise levels
    prediction: str = "epsilon"  # or v
    weighting: str = "min_snr"  # or uniform
    min_snr_gamma: float = 5.0  # Hang et al. 2023, Sec. 3.4
    antithetic: bool = True  # timesteps come in pairs t and T - 1 - t
    ema_decay: float = 0.999  # of the average of the weights, which is what is kept
    timestep: int = 50  # t*, at which `network_weights` of denoiser.pth is folded
    noise_scale: float = 1.0  # noise of unit variance is this many times the spread of intensities in the body
    body_share: float = 0.67  # of the patches are centered on the body, which is brighter than what is around it
    augment: bool = True  # rotations, scalings and mirroring as when labels are learned
    held_out: float = 0.05  # share of the pool that fold `all` does not train on
    sample_every: int = 50  # epochs between two sheets of samples; 0 for none
    sample_steps: int = 50  # of DDIM
    num_samples: int = 8  # on a sheet
    allowed_values = {
        "schedule": one_of(*SCHEDULES), "prediction": one_of(*PREDICTIONS), "weighting": one_of(*WEIGHTINGS),
        "timesteps": at_least(1), "timestep": index_of("timesteps"), "warmup_epochs": at_least(0),
        **dict.fromkeys(("min_snr_gamma", "noise_scale"), above(0)),
        **dict.fromkeys(("ema_decay", "body_share", "held_out"), between(0, 1)),
        "sample_every": at_least(0), "sample_steps": at_least(1), "num_samples": at_least(1),
    }  # fmt: skip
    has_deep_supervision = False
    result_file, next_step = "denoiser.pth", "fine-tune with -tr DiffusionPretrainedTrainer"

    def prepare(self):
        """Refuses a cascade, and makes the diffusion process."""
        if self.is_cascaded:
            raise UserError(
                f"{self.configuration_name} is a cascade's second stage, its input is not an image alone: pre-train "
                "3d_lowres or another configuration without a previous stage"
            )
        self.diffusion = Diffusion(
            self.schedule, self.timesteps, self.prediction, self.weighting, self.min_snr_gamma, self.device
        )

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        """Builds the planned network with one output per image channel, told the timestep."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_input_channels, False
        )
        for head in network.decoder.seg_layers[:-1]:  # nnU-Net builds them, nothing uses them, DDP would complain
            head.requires_grad_(False)
        return condition(network, num_input_channels)

    def initialize(self):
        """Adds the average of the weights."""
        super().initialize()
        self.ema = AveragedModel(unwrap(self.network), multi_avg_fn=warming_ema(self.ema_decay))

    def configure_optimizers(self):
        """Returns AdamW, as diffusion models are trained."""
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = adamw(trainable, self.initial_lr, self.weight_decay)
        return optimizer, WarmupPolyLR(optimizer, self.num_epochs, self.warmup_epochs)

    def get_tr_and_val_datasets(self):
        """Returns all images of the data set, labeled and pool."""
        training, validation = self.do_split()
        train = [join(self.preprocessed_dataset_folder, case) for case in training]
        held_out = [join(self.preprocessed_dataset_folder, case) for case in validation]
        folder = pool_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        pool = [join(folder, case) for case in pool_identifiers(folder)]
        if self.fold == "all":
            train, held_out = hold_out(train, pool, self.held_out)
        else:
            train += pool
        self.trained_on = {"images": len(train), "of_the_pool": len(set(train) & set(pool)), "held_out": len(held_out)}
        self.print_to_log_file(f"Pre-training on these numbers of images: {self.trained_on}")
        return ImageDataset(train), ImageDataset(held_out)

    def get_dataloaders(self):
        """Returns random patches to train on; a fixed set of held-out batches to measure the loss on."""
        train, held_out = self.get_tr_and_val_datasets()
        patch_size, count = self.configuration_manager.patch_size, self.num_val_iterations_per_epoch
        if not self.is_resumed:
            networks = [unwrap(self.network), self.ema.module]
            fixed = fixed_batches(train, 20, self.batch_size, patch_size, self.label_manager, 1234, self.body_share)
            patches = [batch["data"] for batch in fixed]
            self.diffusion.calibrate(networks, image_statistics(train), patches, self.noise_scale)
            for value in self.diffusion.prior if self.is_ddp else ():  # batches need not be equally large everywhere
                torch.distributed.broadcast(value, 0)
        sampled_size, transforms = self.spatial_augmentation() if self.augment else (patch_size, None)
        on_cuda = self.device.type == "cuda"
        loader = image_loader(
            train, self.batch_size, patch_size, sampled_size, self.label_manager, body_share=self.body_share,
            transforms=transforms, workers=get_allowed_n_proc_DA(), pin_memory=on_cuda,
        )  # fmt: skip
        fixed = fixed_batches(held_out, count, self.batch_size, patch_size, self.label_manager, 1234, self.body_share)
        batches = [{**batch, "number": number} for number, batch in enumerate(fixed)]
        self.real_images = batches[0]["data"].numpy()
        return loader, itertools.cycle(batches)

    def spatial_augmentation(self):
        """Returns the geometric part of nnU-Net's augmentation, the views that fine-tuning will show."""
        patch_size = self.configuration_manager.patch_size
        rotation, dummy_2d, size, axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        nnunet = self.get_training_transforms(patch_size, rotation, None, axes, dummy_2d)
        kinds = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform, MirrorTransform)
        return size, ComposeTransforms([t for t in nnunet.transforms if isinstance(t, kinds)])

    def loss_on(self, network, batch, timestep, noise):
        """Computes the diffusion loss on a batch, but for what lies outside the scans and was padded."""
        images = batch["data"].to(self.device, non_blocking=True)
        with self.autocast():
            images = unwrap(self.network).scaled(images)
            return self.diffusion.loss(network, images, timestep, noise, is_scan=batch["target"].to(self.device) >= 0)

    def train_step(self, batch: dict) -> dict:
        """Takes one step at random timesteps, and its part in the average of the weights."""
        shape = batch["data"].shape
        self.optimizer.zero_grad(set_to_none=True)
        timestep = draw_timesteps(len(batch["data"]), self.timesteps, self.antithetic, self.device)
        loss = self.loss_on(self.network, batch, timestep, torch.randn(shape, device=self.device))
        self.optimize(loss, max_norm=1.0)
        self.ema.update_parameters(unwrap(self.network))
        return {"loss": loss.detach().cpu().numpy()}

    def on_validation_epoch_start(self):
        """Measures the averaged weights."""
        self.ema.eval()

    def held_out_draw(self, batch: dict):
        """Returns what is random in the loss on a held-out batch, always the same."""
        count = self.num_val_iterations_per_epoch
        draw = held_out_draw(batch["data"].shape, batch["number"], count, self.timesteps)
        return [tensor.to(self.device) for tensor in draw]

    def validation_step(self, batch: dict) -> dict:
        """Returns the loss of the averaged weights on a held-out batch."""
        return {"loss": self.loss_on(self.ema.module, batch, *self.held_out_draw(batch)).cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        """Logs the loss; every process measured the same batches."""
        self.logger.log("val_losses", float(np.mean(collate_outputs(val_outputs)["loss"])), self.current_epoch)

    def on_epoch_end(self):
        """Writes curves, samples and checkpoints; there is no Dice, and no best checkpoint but the last average."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        losses, held_out, rates, starts = (
            self.logger.get_value(key, step=None)
            for key in ("train_losses", "val_losses", "lrs", "epoch_start_timestamps")
        )
        self.print_to_log_file(
            f"train_loss {losses[-1]:.4f}, held-out loss {held_out[-1]:.4f}, epoch time {time() - starts[-1]:.1f} s"
        )
        epoch, is_last = self.current_epoch + 1, self.current_epoch + 1 == self.num_epochs
        if epoch % self.save_every == 0 and not is_last:
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if self.local_rank == 0:
            pictures.loss_curves(join(self.output_folder, "progress.png"), losses, held_out, rates)
            if self.sample_every and epoch % self.sample_every == 0 and not is_last:
                self.draw_samples(f"samples_epoch_{epoch}.png")
        self.current_epoch += 1

    def extra_state(self) -> dict:
        """Adds the average and the process, so that a resumed run continues them."""
        return {"ema": self.ema.state_dict(), "process": self.diffusion.description}

    def restore(self, checkpoint: dict):
        """Continues the average and the process."""
        self.ema.load_state_dict(checkpoint["ema"])
        if "process" in checkpoint:  # earlier ones were trained with the prior as it comes
            self.diffusion = Diffusion(
                **checkpoint["process"], weighting=self.weighting, gamma=self.min_snr_gamma, device=self.device
            )

    def on_train_end(self):
        """Writes what pre-training is for."""
        super().on_train_end()
        if self.local_rank == 0:
            self.write_result()

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Draws samples; with `--val` it also writes the result again from the final checkpoint."""
        if self.local_rank == 0:
            if self.dataloader_val is None:
                self.dataloader_train, self.dataloader_val = self.get_dataloaders()
            if not isfile(join(self.output_folder, self.result_file)):
                self.write_result()
            self.draw_samples("samples.png")

    def write_result(self):
        """Writes what pre-training is for, from the averaged weights."""
        path = join(self.output_folder, self.result_file)
        values = self.logger.get_value("val_losses", step=None)
        training = {
            **self.trained_on,
            "epochs": self.current_epoch,
            "iterations_per_epoch": self.num_iterations_per_epoch,
            "batch_size": self.configuration_manager.batch_size,
            "body_share": self.body_share,
            "held_out_loss": [float(value) for value in values],
        }
        plan = plan_identity(self.plans_manager, self.configuration_name, self.dataset_json)
        self.save_result(path, plan, training)
        self.print_to_log_file(f"Wrote {path}: {self.next_step}")

    def save_result(self, path: str, plan: dict, training: dict):
        """Writes denoiser.pth."""
        save_denoiser(path, self.ema.module, self.timestep, self.diffusion.description, plan, training)

    def draw_samples(self, name: str):
        """Draws a sheet of generated images under real ones, always from the same noise."""
        patch_size, numbers = self.configuration_manager.patch_size, range(self.num_samples)
        batches = draw_images(
            self.ema.module.eval(), self.diffusion, patch_size, numbers, "ddim", self.sample_steps,
            batch_size=self.batch_size,
        )  # fmt: skip
        title = f"{self.plans_manager.dataset_name}, {self.configuration_name}: DDIM, {self.sample_steps} steps"
        samples = torch.cat(list(batches)).numpy()
        pictures.sample_sheet(join(self.output_folder, name), samples, self.real_images, title)
