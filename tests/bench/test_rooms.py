"""The rooms of bench/: stages run scripts, scripts use pages and kit, pages use kit, and no import goes up."""

import pytest
from house.rules import ROOT, Source

BENCH = ROOT / "bench"
SCRIPTS = {path.stem for path in BENCH.glob("*.py")}
ABOVE = {"kit": {"pages", "gpu_stages", *SCRIPTS}, "pages": {"gpu_stages", *SCRIPTS}, "gpu_stages": {"gpu"}}


@pytest.mark.parametrize("room", ABOVE)
def test_imports_only_go_down(room):
    for path in (BENCH / room).rglob("*.py"):
        found = {module.partition(".")[0] for module, _ in Source(path).imports}
        assert not found & ABOVE[room], path


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_do_not_import_each_other(script):
    assert not {module for module, _ in Source(BENCH / f"{script}.py").imports} & SCRIPTS
