"""Each public name of revflow has an example in its docstring, and the examples run."""

import doctest
import inspect

import pytest
import torch

import revflow

NAMES = [
    name
    for name, public in vars(revflow).items()
    if not name.startswith("_") and (inspect.isclass(public) or inspect.isfunction(public))
]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    torch.manual_seed(0)
    public = inspect.unwrap(getattr(revflow, name))
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(public), {"revflow": revflow, "torch": torch}, name, None, None
    )
    assert test.examples
    report = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)
