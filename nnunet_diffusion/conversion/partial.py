"""Several data sets that each annotate some labels, joined into one with a common label table."""

import os
from collections.abc import Collection, Sequence
from typing import Any

from nnunet_diffusion.conversion.dataset import Converted, convert, dataset_folder
from nnunet_diffusion.conversion.joining import Joined, common_channels, common_ending, common_reader
from nnunet_diffusion.conversion.label_mapping import IGNORE, LabelMapping, map_labels, refuse_hidden_parts
from nnunet_diffusion.conversion.schemas import LabelMappingFile
from nnunet_diffusion.conversion.sources import Source, read_source
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json

REMEDY = "correct it, `nnunet_diffusion convert partial --help` shows how"


def convert_partial(
    mapping: str, dataset_id: int, name: str, only: Collection[str] = (), copy: bool = False, num_threads: int = 1
) -> Converted:
    """Joins the sources that a mapping names into nnUNet_raw/DatasetXXX_Name.

    A case is called SOURCE_CASE. Images are referred to where they are; label maps are written into labelsTr with the
    values of the common table. What each case annotates goes into dataset.json: `annotated_labels`, {case: [label]} of
    the cases that do not annotate all, and `union_labels`, {case: [[label, label, ...], ...]}: voxels with the value
    of a union's first label are any one of its labels; and `sources`, {case: source}. A case that annotates nothing
    joins the unlabeled ones.

    Args:
        mapping: A JSON file, {"labels": [common name, ...], "sources": [...]}: each source has a `name`, its files as
            `read_source` takes them, and `mapping`, `inside` and `excludes` as `map_labels` takes them. Relative
            paths are relative to its folder.
        dataset_id: 1 to 999.
        name: What follows DatasetXXX_.
        only: Names of the sources to join; all if empty.
        copy: Copy the images in, too.
        num_threads: Cases at a time.

    Raises:
        UserError: If the mapping contradicts itself, sources cannot be joined, or a case is not usable.
        OSError: If the data set cannot be written.
    """
    dataset_folder(dataset_id, name)  # refuses what cannot be before anything is read
    content = read_mapping(mapping)
    common, entries = content["labels"], _chosen(content["sources"], only)
    sources = [read_source(entry, os.path.dirname(os.path.abspath(mapping))) for entry in entries]
    rules = [_rule(entry, source, common) for entry, source in zip(entries, sources, strict=True)]
    refuse_hidden_parts(rules)
    joined = Joined(common)
    for source, rule in zip(sources, rules, strict=True):
        joined.add(source, rule)
    joined.refuse_shared_images()
    ending, channels = common_ending(sources), common_channels(sources)
    reader = common_reader(sources, ending)
    description = {
        "channel_names": {str(channel): name for channel, name in enumerate(channels)},
        "labels": {"background": 0, **joined.values},
        "file_ending": ending,
        **({"overwrite_image_reader_writer": reader} if reader else {}),
        "annotated_labels": joined.annotated,
        "union_labels": joined.unions,
        "sources": joined.source_of,
        "converted_with": {"labels": common, "sources": entries},
    }
    folders = [folder for source in sources for folder in source.folders]
    converted = convert(
        dataset_id, name, joined.labeled, joined.unlabeled, description, folders, copy, num_threads, joined.relabeling
    )
    converted.notes += summary(sources, rules, joined)
    converted.warnings += unsupervised(common, rules)
    return converted


def _chosen(entries: list[dict[str, Any]], only: Collection[str]) -> list[dict[str, Any]]:
    names = [entry["name"] for entry in entries]
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f"--only {unknown}: the mapping's sources are {names}")
    return [entry for entry in entries if not only or entry["name"] in only]


def _rule(entry: dict[str, Any], source: Source, common: list[str]) -> LabelMapping:
    keys = ("mapping", "inside", "excludes")
    return map_labels(source.name, source.labels, common, **{key: entry[key] for key in keys if key in entry})


def read_mapping(path: str) -> dict[str, Any]:
    """Reads a mapping file.

    Raises:
        UserError: Naming the key that is wrong.
    """
    content = read_json(path, LabelMappingFile, REMEDY)
    labels, names = content["labels"], [entry["name"] for entry in content["sources"]]
    if len(set(labels)) < len(labels) or "background" in labels or IGNORE in labels[:-1]:
        raise UserError(f"{path}: 'labels' must be a list of different names, without 'background', 'ignore' last")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two sources are called {twice}: rename one, cases are named after their source")
    return content


def summary(sources: Sequence[Source], rules: Sequence[LabelMapping], joined: Joined) -> list[str]:
    """Writes a paragraph for each source: its cases, what they annotate, in unions or not, and what was left out."""
    lines = []
    for source, rule in zip(sources, rules, strict=True):
        cases = [case for case, name in joined.source_of.items() if name == source.name]
        labeled = [case for case in cases if case in joined.labeled]
        exact = [target[0] for target in rule.groups() if len(target) == 1]
        unions = [" or ".join(target) for target in rule.groups() if len(target) > 1]
        left_out = [label for label, target in rule.targets.items() if not target]
        some = sum(case in source.annotated for case in source.labeled)
        lines.append(f"{source.name}: {len(labeled)} labeled, {len(cases) - len(labeled)} unlabeled")
        lines.append(f"  annotated  {', '.join(exact) or '-'}" + (f"; fewer in {some} case(s)" if some else ""))
        lines += [f"  union      {union}" for union in unions]
        lines += [f"  left out   {', '.join(left_out)}"] * bool(left_out)
    return lines


def unsupervised(common: Sequence[str], rules: Sequence[LabelMapping]) -> list[str]:
    """Writes a line for each common label that no source annotates."""
    exact = {target[0] for rule in rules for target in rule.groups() if len(target) == 1}
    unions = {name for rule in rules for target in rule.groups() for name in target} - exact
    lines = []
    for name in common:
        if name in unions:
            lines.append(f"{name!r} is annotated only in unions: nothing teaches which of their voxels it is")
        elif name not in exact and name != IGNORE:
            lines.append(f"no source annotates {name!r}: nothing teaches it; take it out of 'labels', or add a source")
    return lines
