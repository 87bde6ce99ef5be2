"""The pretend device refuses what CUDA would; see pretend.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import conftest

CODE = """
import pretend, torch
pretend.set_up()
x = torch.ones(3, device="pretend:0", requires_grad=True)
(x * 2 + torch.tensor(1.0)).sum().backward()
assert x.grad.device.type == "pretend" and x.grad.tolist() == [2.0] * 3
# Sizes that change in place, indices in a list, sparse gradients, modules that are converted.
assert torch.arange(3, device=x.device)[[2, 0]].tolist() == [2, 0]
assert x.detach().clone().unsqueeze_(0).shape == (1, 3)
table = torch.nn.Embedding(4, 2, sparse=True).to(x.device).double()
assert table.weight.held.dtype == table.weight.dtype == torch.float64
table(torch.tensor([1, 1], device=x.device)).sum().backward()
assert table.weight.grad.is_sparse and table.weight.grad.to_dense()[1].tolist() == [2.0, 2.0]
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


TESTS = Path(__file__).parent
HELD = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/held.py")


def python(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_computes_and_refuses_to_mix_devices() -> None:
    assert python(TESTS, "-c", CODE).split() == ["refused"] * 4


def test_what_tests_and_their_modules_make_is_on_it() -> None:
    out = python(TESTS.parent, *HELD, "--device", "pretend")
    assert "1 passed" in out


def test_tests_that_would_begin_late_are_skipped() -> None:
    out = python(TESTS.parent, *HELD, "--seconds", "-1")
    assert "1 skipped" in out
    assert "the time was up" in out


def test_what_is_excluded_exists() -> None:
    for key in conftest.excluded("pretend"):
        file, _, name = key.partition("::")
        text = (TESTS / file).read_text()
        assert not name or f"def {name}(" in text, key
