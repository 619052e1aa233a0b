"""Names of files and folders that are not UTF-8, as other systems leave them."""

import os
import shutil

import h5py
import pytest

LATIN = os.fsdecode(b"Th\xe9re")
SHOWN = r"Th\udce9re"


@pytest.fixture
def root(own_cities, tmp_path):
    """A data folder of such a name, with a city of such a name."""
    try:
        root = shutil.move(own_cities, tmp_path / f"data-{LATIN}")
    except OSError:
        pytest.skip("the file system takes no such names")
    shutil.rmtree(root / "Here")
    for split in ("training", "validation"):
        (root / "There" / f"There_{split}").rename(root / "There" / f"{LATIN}_{split}")
    (root / "There").rename(root / LATIN)
    return root


@pytest.mark.parametrize("command", ["predict", "figures"])
def test_pictures_of_such_a_city(command, root, run, crevnet, tmp_path):
    out = tmp_path / f"out-{LATIN}"
    said = crevnet(command, run, "--data.root", root, "--out", out)
    assert SHOWN in said and {".h5", ".png", ".gif"} <= {path.suffix for path in out.iterdir()}
    [predicted] = out.glob("*.h5")
    with h5py.File(predicted) as file:
        assert file["array"].attrs["city"] == SHOWN


def test_scores_and_errors_of_such_a_city(root, run, crevnet, failing, tmp_path):
    assert SHOWN in crevnet("evaluate", run, "--data.root", root)
    assert SHOWN in failing("evaluate", run, "--data.root", root / "absent")
    picture = tmp_path / f"{LATIN}.png"
    assert SHOWN in crevnet("show", next(root.rglob("*.h5")), "--out", picture) and picture.is_file()


def test_runs_of_such_a_name(run, root, small, failing, tmp_path):
    """TensorBoard cannot read them."""
    named = shutil.copytree(run, tmp_path / f"run-{LATIN}")
    for command in (
        ("show", named),
        ("figures", named),
        ("fit", *small, "--data.root", root, "--out", tmp_path / LATIN),
    ):
        line = failing(*command)
        assert SHOWN in line and "is no name in UTF-8" in line and "rename it" in line
