"""Each public name of both packages has an example in its docstring, and the examples run."""

import doctest
import inspect

import pytest
import torch

import crevnet
import revflow

NAMES = [
    (package, name)
    for package in (revflow, crevnet)
    for name in dir(package)  # crevnet's names are imported on first use, so vars() lacks them
    if not name.startswith("_")
    and (inspect.isclass(public := getattr(package, name)) or inspect.isfunction(public))
    and public.__module__.startswith(package.__name__)
]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda part: getattr(part, "__name__", part))
def test_the_example_runs(package, name):
    torch.manual_seed(0)
    public = inspect.unwrap(getattr(package, name))
    names = {"revflow": revflow, "crevnet": crevnet, "torch": torch}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(public), names, name, None, None)
    assert test.examples
    report = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)
