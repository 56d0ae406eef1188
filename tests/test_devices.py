"""Code for devices, without one: other tests again, on the device of `pretended_device`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
# What together trains (packed and padded, forward, loss, backward and update), initializes by
# gradients, ties shares and links, keeps a reference, merges in bfloat16, reads rows again,
# combines, and scores stages.
GOLDEN = ["gradient", "dpo", "soft knots, carried", "bfloat16, soft knots", "beside"]


has_backends = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not has_backends, reason="this torch has no backends in Python")
def test_no_tensor_is_left_on_another_device():
    test = HERE / "training/test_golden_losses.py"
    names = [f"{test}::test_losses_and_links_are_as_they_were[{name}]" for name in GOLDEN]
    command = [sys.executable, "-m", "pytest", "-p", "pretended_device", "-p", "no:xdist"]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [*command, *names],
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(GOLDEN)} passed" in done.stdout
