"""The pretend device refuses what CUDA would; see pretend.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import pretend, torch
pretend.set_up()
x = torch.ones(3, device="pretend:0", requires_grad=True)
(x * 2 + torch.tensor(1.0)).sum().backward()
assert x.grad.device.type == "pretend" and x.grad.tolist() == [2.0] * 3
for wrong in (
    lambda: x + torch.ones(3),
    lambda: torch.ones(3) + x,
    lambda: torch.randn(3, device="pretend:0", generator=torch.Generator()),
    lambda: x.detach().numpy(),
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        print("refused")
"""


def test_it_computes_and_refuses_to_mix_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 4
