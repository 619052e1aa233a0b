"""bench/equation5.py on a run: it finds what a float64 inverse loses, and what float32's loses more."""

import re
import sys

import equation5


def test_what_is_printed(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["equation5.py", str(run)])
    equation5.main()
    errors = re.findall(
        r"torch.float(\d\d): largest error ([\d.e+-]+), smallest 1 - g ([\d.]+)", capsys.readouterr().out
    )
    (_, single, rest), (_, double, _) = errors
    assert 0 < float(double) < 1e-8 < float(single) < 1e-2 and 0 < float(rest) < 1
