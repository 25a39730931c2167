"""Synthetic torso CTs with labeled organs: the embedded data set of the demo and the tests.

A scan is a stack of implicit surfaces (ellipsoids, tubes, sheets) in the patient's millimeters, drawn in anatomical
order through one smooth random deformation, so that organs press on one another and no two patients are alike.
Contrast phase, size, position, shape, lesions, bowel, fat and noise vary from case to case; organs overlap in
Hounsfield units with one another and with unlabeled tissue, and the kidneys differ only in their side. It is a toy
to try software with, not a model of anybody's anatomy.

Axes: +x is the patient's left, +y posterior, +z superior (LPS, as in DICOM); arrays are (z, y, x) as in SimpleITK.
"""

import argparse
import os

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from nnunet_diffusion.demo.torso import Torso, all_of
from nnunet_diffusion.files import write_json
from nnunet_diffusion.image_files import write_scan

LABELS = {"background": 0, "liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4, "stomach": 5, "aorta": 6}
LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, STOMACH, AORTA = range(1, 7)

FAT, LUNG = -100.0, -840.0  # Hounsfield units


def draw_trunk(t: Torso) -> tuple[np.ndarray, np.ndarray]:
    """Draws table, skin, fat, the muscular wall, and a cavity full of fat; returns the distances to skin and cavity."""
    width, depth = t.vary((160, 116), 0.05)
    fat_mm, wall_mm = float(t.rng.uniform(5, 28)), float(t.rng.uniform(9, 14))
    t.paint(np.abs(t.y + (t.x / 40) ** 2 - depth - 18) - 3, 120.0)
    t.deform(6.5, 170)
    profile = 0.97 - 0.05 * np.exp(-(((t.z + 30) / 60) ** 2))  # a waist
    furrow = 9 * np.exp(-((t.x / 14) ** 2)) * np.clip(t.y / 60, 0, 1)

    def shell(inward_mm, power):
        a, b = (width - inward_mm) * profile, depth - 0.85 * inward_mm
        return ((np.abs(t.x / a) ** power + np.abs((t.y + furrow) / b) ** power) ** (1 / power) - 1) * min(width, depth)

    skin = shell(0, 2.4)
    t.paint(skin, 10.0)
    t.paint(skin + 3, FAT + 7 * t.texture)
    t.paint(all_of(shell(fat_mm, 2.3), t.y - depth + 14), 56 + 7 * t.texture)
    t.deform(3.5, 60)
    back = t.y - depth + 42 + 8 * np.exp(-((t.x / 30) ** 2))  # the cavity ends in front of the muscles of the back
    cavity = all_of(shell(fat_mm + wall_mm, 2.2), back)
    t.paint(cavity, FAT + 7 * t.texture)
    return skin, cavity


def draw_bowel(t: Torso, cavity: np.ndarray) -> None:
    """Draws unlabeled loops, some with gas or contrast, and a colon at both flanks: what organs are confused with."""
    for _ in range(int(t.rng.integers(45, 90))):
        center = t.rng.uniform((-105, -95, -175), (105, 15, 5))
        radii = t.rng.uniform(9, 17, 3) * (1 + (t.rng.random(3) < 0.35))
        hu, tilt = t.rng.normal(t.tissue["bowel"], 12), t.rng.uniform(-60, 60, 2)
        t.blob(center, radii, hu, tilt_deg=tilt, inside=cavity + 2)
        if t.rng.random() < 0.3:
            content = t.rng.choice([-700.0, -60.0, 180.0], p=[0.6, 0.25, 0.15])
            t.blob(center, radii - 6, content, tilt_deg=tilt, inside=cavity + 5)
    for side in (-1, 1):
        phase, x, y = t.rng.uniform((0, 92, -15), (6, 108, 20))
        colon = t.tube(side * x + 8 * np.sin(t.z / 17 + phase), y + 8 * np.cos(t.z / 25), 18 + 3 * np.sin(t.z / 6))
        colon = all_of(colon, t.z + 30 - side * 25, cavity + 2)
        t.paint(colon, t.tissue["bowel"] + 10)
        t.paint(colon + 4, np.where(t.smooth(1, 14) > t.rng.normal(0.3, 0.6), -600.0, 15.0))


def draw_stomach(t: Torso, cavity: np.ndarray, shift: np.ndarray) -> None:
    """Draws fundus and antrum with one content of water, food or contrast, gas in front: the patient lies supine."""
    content = t.rng.choice([15.0, 40.0, 65.0, 220.0], p=[0.35, 0.3, 0.25, 0.1]) + 12 * t.texture
    center, radii = t.move((54, -34, 46) + shift, 9), t.vary((42, 34, 50), 0.15)
    level = center[1] - radii[1] * t.rng.uniform(0, 1.0)
    parts = [(center, radii), (t.move((12, -52, 8) + shift, 9), t.vary((44, 22, 22), 0.15))]
    tilts = [(t.rng.normal(20, 10), t.rng.normal(-25, 10)), (t.rng.normal(10, 10), t.rng.normal(35, 12))]
    for (center, radii), tilt in zip(parts, tilts, strict=True):
        t.blob(center, radii, 58.0, STOMACH, tilt, cavity + 2)
    for (center, radii), tilt in zip(parts, tilts, strict=True):
        filling = np.where(t.y < level, np.float32(-880), content)
        t.blob(center, [r - 5 for r in radii], filling, STOMACH, tilt, cavity + 6)


def draw_liver(t: Torso, cavity: np.ndarray, shift: np.ndarray) -> None:
    """Draws two lobes and a lower segment, with portal vessels, sometimes cysts or metastases, a gallbladder below."""
    liver = t.tissue["liver"] + 6 * t.texture
    lobes = (
        ((-76, 0, 42), (72, 92, 96), (-8, 22)),
        ((-82, 14, -28), (42, 52, 56), (0, 0)),
        ((-30, -58, 58), (86, 36, 42), (8, 12)),
    )
    for center, radii, tilt in lobes:
        t.blob(t.move(center + shift, 6), t.vary(radii, 0.1), liver, LIVER, t.move(tilt, 5), cavity + 2)
    for _ in range(int(t.rng.integers(3, 8))):
        radii = t.rng.uniform((12, 4, 4), (32, 7, 7))
        center, tilt = t.move((-55, -10, 52) + shift, 22), t.rng.uniform(-70, 70, 2)
        t.blob(center, radii, t.tissue["vein"] + 8, LIVER, tilt, only=LIVER)
    for _ in range(int(t.rng.choice([0, 0, 1, 3]))):
        hu = t.rng.choice([8.0, t.tissue["liver"] - 35])
        t.blob(t.move((-75, 0, 45) + shift, 32), [t.rng.uniform(7, 20)] * 3, hu, LIVER, only=LIVER)
    t.blob(t.move((-52, -42, -12) + shift, 7), t.vary((14, 17, 25), 0.2), 12.0, inside=cavity + 4)


def draw_spleen(t: Torso, cavity: np.ndarray, shift: np.ndarray) -> None:
    """Draws a crescent under the left ribs."""
    center, tilt = np.array(t.move((98, 36, 44) + shift, 7)), (t.rng.normal(-28, 8), t.rng.normal(14, 8))
    box = t.box(center, 60)
    crescent = t.ellipsoid(center, t.vary((30, 48, 50), 0.14), tilt, box)
    hollow = t.ellipsoid(center - (36, 20, 0), (28, 40, 64), tilt, box)
    t.paint(all_of(crescent, -hollow, cavity[box] + 2), t.tissue["spleen"] + 7 * t.texture[box], SPLEEN, box)


def draw_pancreas(t: Torso, cavity: np.ndarray, shift: np.ndarray) -> None:
    """Draws it unlabeled, and much like the spleen in contrast."""
    hu = t.tissue["spleen"] - 12 + 12 * t.texture
    center, radii, tilt = t.move((18, -12, 2) + shift, 6), t.vary((54, 11, 13), 0.15), t.move((-14, 22), 6)
    t.blob(center, radii, hu, tilt_deg=tilt, inside=cavity + 2)
    t.blob(t.move((-22, -14, -22) + shift, 6), t.vary((18, 15, 26), 0.15), hu, inside=cavity + 2)


def draw_kidney(t: Torso, center, side: int, label: int, cavity: np.ndarray) -> None:
    """Draws a kidney in its fat: cortex, medulla, and the sinus that opens to the midline; both sides alike."""
    radii = t.vary((29, 24, 54), 0.1)
    tilt = (side * t.rng.normal(35, 8), side * t.rng.normal(-12, 5))
    t.blob(center, [r + 7 for r in radii], FAT, tilt_deg=tilt, inside=cavity + 1)
    cortex = t.tissue["kidney"] + 7 * t.texture
    t.blob(center, radii, cortex, label, tilt, cavity)
    t.blob(center, [r - 9 for r in radii], cortex - 0.25 * max(0.0, t.tissue["kidney"] - 40), label, tilt, cavity)
    t.blob((center[0] - side * 20, center[1] - 8, center[2]), (14, 8, 20), FAT + 30, 0, tilt, only=label)
    if t.rng.random() < 0.3:
        t.blob(t.move(center, 16), [t.rng.uniform(6, 15)] * 3, 6.0, label, only=label)


def draw_chest(t: Torso, cavity: np.ndarray, shift: np.ndarray) -> None:
    """Draws lungs on the domes of the diaphragm, with vessels, and the heart between them."""
    top, drop = shift[2] + t.rng.uniform((100, 48), (116, 66))
    right = ((t.x + 68) / 78) ** 2 + ((t.y + 12) / 95) ** 2
    left = ((t.x - 68) / 74) ** 2 + ((t.y + 12) / 95) ** 2 + 0.15
    above = top - drop * np.minimum(right, left) - t.z
    middle = np.abs(t.x - 8) - 30 + 14 * np.tanh((t.y + 5) / 25)
    t.paint(all_of(above - 2, cavity), 50.0)  # the diaphragm itself
    lung = all_of(above, cavity + 2, -middle)
    t.paint(lung, LUNG + 22 * t.texture)
    bronchi = (np.abs(t.smooth(1, 13)) - 0.25 + 0.9 * np.clip((np.abs(t.x) - 30) / 90, 0, 1)) * 12
    t.paint(all_of(lung + 4, bronchi), 20.0)
    t.paint(all_of(above + 4, cavity + 3, middle), -60 + 25 * t.texture)
    blood = 0.6 * t.tissue["aorta"] + 25 + 5 * t.texture
    t.blob(t.move((26, -38, 138), 7), t.vary((60, 48, 46), 0.08), blood, tilt_deg=(25, -20), inside=cavity + 5)


def draw_vessels(t: Torso) -> None:
    """Draws the aorta, labeled down to where it divides, and the vena cava beside it."""
    x, fork = t.rng.normal(7, 3), t.rng.normal(-108, 6)
    radius, bend, cava_radius = t.vary((10.5, 3.5, 10.5), 0.12)
    blood = t.tissue["aorta"] + 4 * t.texture
    course = x + bend * np.sin(t.z / 60) + 10 / (1 + np.exp((70 - t.z) / 20)), 13 + 7 * np.tanh((t.z - 40) / 50)
    t.paint(all_of(t.tube(*course, radius), fork - t.z), blood, AORTA)
    if t.rng.random() < 0.4:
        plaque = all_of(np.abs(t.tube(*course, radius - 1)) - 2, (1.5 - t.smooth(1, 14)) * 8)
        t.paint(plaque, 600.0, AORTA, only=AORTA)
    for side in (-1, 1):
        t.paint(all_of(t.tube(x + side * (7 + 0.4 * (fork - t.z)), 13, 6.5), t.z - fork), blood)
    cava = t.tube(x - 33 + 6 * np.tanh((t.z - 60) / 40), 11 - 12 * np.tanh((t.z - 60) / 40), cava_radius)
    t.paint(all_of(cava, t.z - 112, fork - t.z), t.tissue["vein"])


def draw_spine(t: Torso, skin: np.ndarray) -> None:
    """Draws muscles of the back, vertebrae with discs, canal and processes."""
    muscle = 55 + 7 * t.texture
    for side in (-1, 1):
        t.paint(all_of(t.tube(side * (27 - 0.13 * t.z), 42, np.clip(10 - t.z / 11, 1, 22)), t.z - 20), muscle)
        t.paint(all_of(np.hypot((t.x - side * 34) / 1.4, t.y - 82) - 20, skin + 9), muscle)
    level = (t.z + t.rng.uniform(0, 34)) / 34
    disc = (0.5 - np.abs(level - np.round(level))) * 34 - 4  # negative within 4 mm of a disc's middle
    body = np.hypot(t.x / 1.25, t.y - 44) - 18 - np.clip(3 - disc / 3, 0, 3)
    marrow = float(t.rng.normal(170, 40)) + 25 * t.texture
    t.paint(body, np.where(disc < 0, 85.0, marrow + 230))
    t.paint(body + 4, np.where(disc < 2, 90.0, marrow))
    t.paint(all_of(np.abs(np.hypot(t.x / 1.1, t.y - 68) - 11) - 3, 58 - t.y), 430.0)
    t.paint(np.hypot(t.x / 1.2, t.y - 67) - 8, 30.0)
    t.paint(all_of(np.abs(t.x) - 3, np.abs(t.y - 89) - 10, 4 - disc), 480.0)
    t.paint(all_of(np.abs(t.y - 76 + 0.1 * np.abs(t.x)) - 3.5, np.abs(np.abs(t.x) - 26) - 14, 8 - disc), 400.0)


def draw_ribs_and_pelvis(t: Torso, skin: np.ndarray, cavity: np.ndarray) -> None:
    """Draws ribs that slant forward in the wall of the chest, and the wings of the pelvis."""
    slant = (t.z - 0.6 * t.y + t.rng.uniform(0, 27)) / 27
    rib = all_of(
        np.abs(slant - np.round(slant)) * 27 - 5, np.abs(cavity - 5) - 3.5, 34 - np.abs(t.x), -15 - t.z - 0.45 * t.y
    )
    t.paint(rib, 420.0)
    t.paint(rib + 3, 220.0)
    across = np.abs(t.x)
    wing = np.abs(t.y - 76 + 0.0095 * np.clip(across - 26, 0, None) ** 2) - 4 - 2 * np.clip(-t.z / 80 - 1.3, 0, 1)
    crest = t.z + 112 + ((across - 82) / 9) ** 2 / 2
    wing = all_of(wing, crest, 30 - across, across - 118, skin + 10)
    t.paint(wing, 560.0)
    t.paint(wing + 3, 230.0)


def phantom(
    seed: int | list[int],
    shape: tuple[int, int, int] = (64, 96, 96),
    spacing_mm: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one synthetic patient; the same seed and geometry give the same bytes.

    Args:
        seed: Of the patient: anatomy, contrast phase and noise.
        shape: (z, y, x) voxels; about 380 x 290 mm in the plane hold every patient.
        spacing_mm: (z, y, x).

    Returns:
        image: int16 Hounsfield units, and labels: uint8 with the values of `LABELS`, both (z, y, x).
    """
    t = Torso(shape, spacing_mm, np.random.default_rng(seed))
    skin, cavity = draw_trunk(t)
    shift = np.array((0, 0, t.rng.normal(0, 9)))  # breathing moves all organs together
    draw_bowel(t, cavity)
    draw_pancreas(t, cavity, shift)
    draw_stomach(t, cavity, shift)
    draw_liver(t, cavity, shift)
    draw_spleen(t, cavity, shift)
    draw_kidney(t, t.move((-64, 40, -28) + shift, 7), -1, RIGHT_KIDNEY, cavity)
    draw_kidney(t, t.move((64, 40, -16) + shift, 7), 1, LEFT_KIDNEY, cavity)
    draw_chest(t, cavity, shift)
    draw_vessels(t)
    draw_spine(t, skin)
    draw_ribs_and_pelvis(t, skin, cavity)
    # the scanner: point spread, then noise that is correlated in the plane as filtered back projection leaves it
    image = gaussian_filter(t.hu, [0.3, 0.45, 0.45])
    noise = gaussian_filter(t.rng.standard_normal(shape, dtype=np.float32), [0.0, 0.6, 0.6])
    image += noise * np.float32(t.rng.uniform(9, 24) / noise.std()) * np.where(image < -900, 0.5, 1)
    return np.clip(np.round(image), -1024, 3071).astype(np.int16), t.labels


def write_image(path: str | os.PathLike, array: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    """Writes a (z, y, x) array as NIfTI with its center at the origin and LPS axes, whole or not at all."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing_mm[::-1]])
    image.SetOrigin([-0.5 * s * (n - 1) for s, n in zip(spacing_mm[::-1], array.shape[::-1], strict=True)])
    write_scan(image, path)


def write_phantom_dataset(
    folder: str | os.PathLike,
    labeled: int = 4,
    unlabeled: int = 32,
    test: int = 6,
    seed: int = 0,
    shape: tuple[int, int, int] = (64, 72, 96),
    spacing_mm: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> None:
    """Writes a raw nnU-Net data set of phantoms, each case a patient of its own.

    Labeled cases go to imagesTr and labelsTr, unlabeled ones to imagesUn (listed under `unlabeled` in dataset.json),
    and test cases to imagesTs and labelsTs. The number of slices and the spacing vary by a few per cent.

    Args:
        folder: DatasetXXX_Name; created, files of the same name are replaced.
        labeled: Number of cases with labels.
        unlabeled: Number of cases without.
        test: Number of held-out cases with labels.
        seed: Of the data set; case by case the same for any number of cases.
        shape: (z, y, x) voxels of the average scan.
        spacing_mm: (z, y, x) of the average scan.

    Raises:
        OSError: If the folder cannot be written to.
    """
    unlabeled_table = {}
    kinds = ("Tr", labeled), ("Un", unlabeled), ("Ts", test)
    cases = [(kind, split, number) for split, (kind, count) in enumerate(kinds) for number in range(count)]
    for kind, split, number in tqdm(cases, "phantoms", disable=None):
        case = f"phantom_{kind.lower()}_{number:03d}"
        rng = np.random.default_rng([seed, split, number])
        slices, spacing = int(shape[0] * rng.uniform(0.94, 1.06)), spacing_mm * rng.uniform(0.96, 1.04, 3)[[0, 1, 1]]
        image, labels = phantom([seed, split, number, 1], (slices, *shape[1:]), tuple(spacing))
        os.makedirs(os.path.join(folder, f"images{kind}"), exist_ok=True)
        write_image(os.path.join(folder, f"images{kind}", f"{case}_0000.nii.gz"), image, spacing)
        if kind == "Un":
            unlabeled_table[case] = {"images": [f"imagesUn/{case}_0000.nii.gz"]}
            continue
        os.makedirs(os.path.join(folder, f"labels{kind}"), exist_ok=True)
        write_image(os.path.join(folder, f"labels{kind}", f"{case}.nii.gz"), labels, spacing)
    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": labeled, "file_ending": ".nii.gz"}
    write_json(os.path.join(folder, "dataset.json"), description | {"unlabeled": unlabeled_table})


def main() -> None:
    """Runs `python -m nnunet_diffusion.demo.phantom FOLDER`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", help="DatasetXXX_Name")
    for name, default in (("labeled", 4), ("unlabeled", 32), ("test", 6), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    try:
        write_phantom_dataset(**vars(parser.parse_args()))
    except OSError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
