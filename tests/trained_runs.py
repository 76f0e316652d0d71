"""A small run of ``pyrovae train``, made once for the tests that need one."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

# Without the decomposition but where it is the point, and scored by the guide, which needs no fits.
QUICK = [
    *("--train.epochs", "2", "--evaluate.num-samples", "60", "--evaluate.decompose", "0"),
    *("--evaluate.proposal", "guide"),
    *("--model.hidden", "20", "--model.latent-dim", "2"),
]


class TrainedRun(NamedTuple):
    """The folder of a run, and what the command printed."""

    folder: Path
    out: str
    err: str


def trained(place: Path) -> TrainedRun:
    """Train on the digits with ``QUICK`` options in a folder."""
    from pyrovae.cli.app import main

    before, out, err = Path.cwd(), StringIO(), StringIO()
    os.chdir(place)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["train", "--name", "mine", *QUICK])
    finally:
        os.chdir(before)
    assert code == 0, err.getvalue()
    return TrainedRun(place / "runs" / "mine", out.getvalue(), err.getvalue())
