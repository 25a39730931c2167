"""Packaging: the three plug-in folders at the top install as subpackages of nnunet_diffusion."""

from pathlib import Path

from setuptools import find_packages, setup

PLUG_INS = ("trainers", "planners", "dataset_conversion")

if __name__ == "__main__":
    setup(
        name="nnunet_diffusion",
        version="0.1.0",
        description="Label-efficient segmentation as an nnU-Net plug-in: diffusion pre-training of the planned network",
        license="Apache-2.0",
        python_requires=">=3.10",
        packages=find_packages(include=["nnunet_diffusion", "nnunet_diffusion.*"])
        + [f"nnunet_diffusion.{name}" for name in PLUG_INS],
        package_dir={f"nnunet_diffusion.{name}": name for name in PLUG_INS},
        install_requires=["nnunetv2>=2.8.1,<2.9"],
        extras_require={"dev": ["pytest", "ruff", "pre-commit"]},
        entry_points={"console_scripts": ["nnunet_diffusion = nnunet_diffusion.cli:main"]},
    )
