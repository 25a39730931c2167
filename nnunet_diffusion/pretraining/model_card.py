"""The model card of a denoiser, in Markdown: what it was trained on, how, and what nobody but its owner can say."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_diffusion.pretraining.nnssl import readable_citations
from nnunet_diffusion.records import sha256

CARD = """\
# Denoiser of {dataset_name}, {configuration}

A denoising diffusion model: the very network that nnU-Net planned for `{dataset_name}` (`{plans_name}`), trained
without labels by nnunet_diffusion. Segmentation networks of the same plan start from it, and images can be drawn from
it.

## Trained on

{data}

## Made into

{preprocessing}

## Training

{training}
{curves}
## Use

```bash
nnunet_diffusion plan_and_preprocess -d YOUR_DATASET --like THIS_FOLDER
nnunet_diffusion sample --denoiser THIS_FOLDER/denoiser.pth -n 4 -o samples
```

The first command plans your data set like this one: spacing, normalization with its intensity statistics, patch and
network are this denoiser's. It says which training starts from the denoiser.

`denoiser.pth` holds tensors and plain values; nothing in it is run. Its SHA-256 is `{digest}`.

## License

**Not stated yet.** Whoever shares this folder says here under which license, and who may use it for what.

## Limits

For research; no medical device. Networks can remember training scans, and samples can resemble them: whoever shares
this folder has asked who owns the data.

## Cite

{citations}
"""


def model_card(path: str, content: Mapping[str, Any], fingerprint: Mapping[str, Any], has_curves: bool) -> str:
    """Writes the card of a denoiser.

    Args:
        path: Of denoiser.pth, for its checksum.
        content: From `load_denoiser`.
        fingerprint: nnU-Net's, of the labeled cases.
        has_curves: Whether progress.png lies beside the card.
    """
    plan = content["plan"]
    names = {key: plan[key] for key in ("dataset_name", "plans_name", "configuration")}
    cited = readable_citations(content.get("citations"))
    return CARD.format(
        **names,
        data=table(data_rows(content, fingerprint)),
        preprocessing=table(preprocessing_rows(plan)),
        training=table(training_rows(content)),
        curves="\n![Losses of the training](progress.png)\n" if has_curves else "",
        digest=sha256(path),
        citations="\n".join(f"- {text}" for text in cited) or "nnU-Net and nnunet_diffusion",
    )


def data_rows(content: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Says what the images were."""
    training, channels = content["training"], content["plan"]["channel_names"]
    spacing, shape = (np.median(fingerprint[key], 0) for key in ("spacings", "shapes_after_crop"))
    return {
        "images": f"{training.get('images', 'not recorded')}, of which {training.get('of_the_pool', '?')} were never "
        "annotated; no label was used",
        "held out, to measure the loss on": str(training.get("held_out", "not recorded")),
        "channels": ", ".join(channels.values()),
        "median spacing of the labeled scans": f"{numbers(spacing)} mm",
        "median size of the labeled scans": f"{numbers(shape)} voxels",
    }


def preprocessing_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """Says what the network sees."""
    rows = {
        "spacing": f"{numbers(plan['spacing'])} mm",
        "patch": f"{numbers(plan['patch_size'])} voxels",
        "normalization": ", ".join(plan["normalization_schemes"]),
    }
    kept = ("mean", "std", "percentile_00_5", "percentile_99_5")
    for channel, values in plan["intensities"].items():
        said = ", ".join(f"{key} {values[key]:.4g}" for key in kept if key in values)
        rows[f"intensities of channel {channel}, labeled foreground"] = said
    return rows


def training_rows(content: Mapping[str, Any]) -> dict[str, str]:
    """Says what was trained, how long, and how well."""
    training, process = content["training"], content["process"]
    aliases = ("decoder.encoder.", ".all_modules.")
    own = [weight for name, weight in content["network_weights"].items() if not any(part in name for part in aliases)]
    million = sum(weight.numel() for weight in own) / 1e6
    losses = training.get("held_out_loss") or []
    return {
        "network": f"{content['plan']['network_class'].split('.')[-1]}, {million:.2f} million weights",
        "process": f"{process['schedule']}, {process['timesteps']} timesteps, predicts {process['prediction']}",
        "steps": f"{training.get('epochs', '?')} epochs of {training.get('iterations_per_epoch', '?')}, batch "
        f"{training.get('batch_size', '?')}",
        "loss on held-out images, first and last epoch": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "none",
        "folded at timestep": f"{content['timestep']}, in the weights that other programs read",
        "versions": ", ".join(f"{name} {value}" for name, value in content.get("versions", {}).items()),
    }


def table(rows: Mapping[str, str]) -> str:
    """Writes a table of two columns."""
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| -- | -- |", *lines])


def numbers(values: Any) -> str:
    """Writes a size, such as 1.5 x 0.8 x 0.8."""
    return " x ".join(f"{value:.4g}" for value in values)
