"""Packaging: the three plug-in folders at the top install as subpackages of nnunet_diffusion."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")
PLUG_INS = ("trainers", "planners", "dataset_conversion")

# nnU-Net imports every module of a folder that it is pointed at: an import of this file must do nothing.
if __name__ == "__main__":
    setup(
        name="nnunet_diffusion",
        version="0.1.0",
        description="Label-efficient segmentation as an nnU-Net plug-in: diffusion pre-training of the planned network",
        long_description=README.read_text(encoding="utf-8") if README.exists() else "",
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        classifiers=[
            "Development Status :: 3 - Alpha",
            "Intended Audience :: Healthcare Industry",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX",
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3.10",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Topic :: Scientific/Engineering :: Medical Science Apps.",
        ],
        keywords="nnU-Net, segmentation, diffusion, pre-training, self-supervised, medical imaging",
        python_requires=">=3.10,<3.14",
        packages=find_packages(include=["nnunet_diffusion", "nnunet_diffusion.*"])
        + [f"nnunet_diffusion.{name}" for name in PLUG_INS],
        package_dir={f"nnunet_diffusion.{name}": name for name in PLUG_INS},
        package_data={"nnunet_diffusion.dataset_conversion": ["*.json"], "nnunet_diffusion.report": ["page.*"]},
        install_requires=[
            "nnunetv2>=2.8.1,<2.9",
            # What we import beside it. nnU-Net bounds their versions; bounds of our own would only add conflicts.
            "SimpleITK",
            "acvl-utils",
            "batchgenerators",
            "batchgeneratorsv2",
            "blosc2",
            "dynamic-network-architectures",
            "jinja2",
            "matplotlib",
            "nibabel",
            "numpy",
            "packaging",
            "pandas",
            "pillow",
            "pydantic",
            "scikit-image",
            "scipy",
            "torch",
            "torchvision",
            "tqdm",
            "typing_extensions",
        ],
        extras_require={
            "dev": [
                "pre-commit",
                "pytest<9.2",  # with 9.2 pytest-xdist 3.8 no longer sees the groups of tests
                "pytest-timeout",
                "pytest-xdist",
                "ruff==0.17.6",  # another one formats otherwise
                "setuptools",
            ],
            # Many scans on many machines: --scheduler.
            "cluster": ["dask[distributed]", "dask-jobqueue"],
            # Other implementations of the diffusion process and of figures: tests compare ours with them.
            "reference": [
                "diffusers; python_version >= '3.11'",
                "prdc",
                "torch-fidelity",  # torchmetrics' FID is not there without it
                "torchmetrics",
            ],
        },
        entry_points={"console_scripts": ["nnunet_diffusion = nnunet_diffusion.cli:main"]},
    )
