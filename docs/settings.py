"""Writes settings.md: every setting of every trainer, from the classes themselves.

Run it after a change: python docs/settings.py
"""

import ast
import inspect
import io
import tokenize
from pathlib import Path

from nnunet_diffusion.installation import trainer_names
from nnunet_diffusion.settings import declared
from nnunet_diffusion.trainers import our_trainers

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# Settings

Written by `docs/settings.py` from the trainers. A setting is a class attribute; plans.json overrides it, and is saved
with the model. A block counts for the class that it names and for those that derive from it, as if the class itself had
these values: a nearer class's block, or its own default, wins. So `{"ConfiguredTrainer": {"num_epochs": 500}}` is for
all trainers. An unknown trainer or setting, a value of another type, or a number that is not finite is an error.

The file to edit is the plan that trainings read, `nnUNet_preprocessed/DATASET/PLANS.json`; `plans.json` in a model
folder is the copy that was trained with. To train one plan in two ways, copy it to `PLANS_scratch.json`, set
`"plans_name": "PLANS_scratch"` in the copy, and train with `-p PLANS_scratch`: results are named after that key, and
with the old one the second training replaces the first. A plan of another name does not find the first one's denoiser:
give its path with the setting `start`.

**Where the weights come from** is one setting, `start`: `denoiser` (the data set's own pre-training, of the same fold
or of fold `all`), `scratch`, or the path of a denoiser.pth or of a checkpoint, absolute or below
`nnUNet_results/DATASET`; `{fold}` stands for the fold. What the file is, its content says: a denoiser is folded at
`timestep`; a checkpoint of nnU-Net for the same labels is taken as it is, output heads and all, one for other labels
without its heads; of one of nnssl the encoder ([sharing.md](sharing.md)). Nothing silently starts from scratch, and
`transfer_report.json` says what became of every parameter. `-pretrained_weights` is nnU-Net's: it takes all weights but
the output heads, of a denoiser those folded at the file's own timestep; it and `start` contradict each other.

```json
"nnunet_diffusion": {"DenoisingDiffusionTrainer": {"num_epochs": 500, "schedule": "cosine"}}
```

`CompactPlanner` writes such a block, with settings for short trainings on a laptop, into the plans that it makes.

**Why these defaults**, on a GPU with `DiffusionPlanner`'s `3d_fullres`. None has been tuned there: what was measured
was measured on CPUs, with small networks and short trainings.

| | default | reason |
|---|---|---|
| length of every training, pre-training included | 1000 epochs of 250 steps | nnU-Net's own |
| pre-training: optimizer, rate | AdamW, 3e-4, 5 epochs of warm-up | usual for diffusion; `CompactPlanner` has 3e-3 |
| average of the weights | 0.999 | usual; `CompactPlanner`'s short pre-trainings keep it |
| weighting of noise levels | min-SNR, 5 | published (Hang et al. 2023) |
| t\\* | 50 | measured: 0 is level, from 150 on less ([label_efficiency.md](label_efficiency.md)) |
| patches centered on the body | two thirds | measured ([label_efficiency.md](label_efficiency.md)) |
| views | `auto` | measured in 2-D: +0.04 Dice with two labeled scans ([results.md](results.md)) |
| fine-tuning | nnU-Net's SGD, 1e-2, no warm-up | nnU-Net's own; in a few thousand steps only AdamW finds something |
| the mean teacher | [its page](mean_teacher.md) | published values, some measured |

Inherited settings without effect: `weighting`, `min_snr_gamma`, `timestep`, `sample_steps` of DiffusionTeacherTrainer;
`supervised_share`, `least_dice`, `ema_decay`, `confidence`, `adaptive`, `absent`, `paste`, `strong_probability` of
DiffusionCoTrainingTrainer.
"""


def comments(cls: type) -> dict[str, str]:
    """Returns the comment beside each annotated attribute of a class, with the comment lines that follow it."""
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = (token.string.lstrip("# "), token.line.strip().startswith("#"))
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            number = node.end_lineno
            parts = [lines[number][0]] if number in lines else []
            while parts and lines.get(number + 1, ("", False))[1]:
                number += 1
                parts.append(lines[number][0])
            found[node.target.id] = " ".join(parts)
    return found


def section(cls: type) -> str:
    """Describes a trainer: what it is, its own settings, and whose it has besides."""
    own, values = comments(cls), declared(cls)
    trainers = [base for base in cls.__mro__ if base.__name__ in trainer_names()]
    lines = [f"## {cls.__name__}\n", inspect.getdoc(cls).splitlines()[0] + "\n"]
    names = [name for name in own if name in values]
    if names:
        lines += ["| setting | default | |", "|---|---|---|"]
        said = {name: next(filter(None, (comments(c).get(name, "") for c in trainers)), "") for name in names}
        lines += [f"| `{name}` | `{values[name][1]!r}` | {said[name].replace('|', chr(92) + '|')} |" for name in names]
        lines.append("")
    if bases := [base.__name__ for base in trainers[1:]]:
        lines.append(f"Also those of {', '.join(f'[{base}](#{base.lower()})' for base in bases)}.\n")
    return "\n".join(lines)


def write() -> str:
    """Writes the whole page; a trainer comes after those that it derives from."""
    classes = our_trainers()
    classes.sort(key=lambda cls: (len(cls.__mro__), cls.__name__))
    return "\n".join([HEAD, *map(section, classes)]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
