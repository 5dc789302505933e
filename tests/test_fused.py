"""The fused cross-entropy: the kernel against the plain form, and what stands around the kernel without one."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.losses import SoftmaxConfig, chunked_cross_entropy, fused_cross_entropy
from recsys.types import NO_DOMAIN, Batch, Catalog


def plain_kernel(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert logits.dtype == torch.float32
    slope = logits.softmax(1) - F.one_hot(targets, logits.shape[1])
    return F.cross_entropy(logits, targets, reduction="none"), slope.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_products_around_the_kernel_give_value_and_gradients(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = types.ModuleType("recsys.fused")
    kernel.cross_entropy_and_gradient = plain_kernel
    monkeypatch.setitem(sys.modules, "recsys.fused", kernel)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator).requires_grad_()
    weight = torch.randn(17, 6, generator=generator).requires_grad_()
    targets = torch.randint(17, (11,), generator=generator)
    found = []
    for loss in (
        fused_cross_entropy(hidden, weight, targets, 4, dtype),
        chunked_cross_entropy(hidden, weight, targets, 4),
    ):
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, [hidden, weight])])
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)


def test_on_a_cpu_nothing_changes() -> None:
    catalog = Catalog(("a", "b"), torch.tensor([NO_DOMAIN, 0, 1, 0, 1]), torch.arange(5))
    targets = torch.tensor([[1, 2], [3, 4]])
    domains = catalog.item_domain[targets]
    batch = Batch(torch.arange(2), targets, domains, torch.zeros_like(targets), targets, domains)
    generator = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(2, 2, 3, generator=generator), torch.randn(5, 3, generator=generator)
    losses = [SoftmaxConfig(fused=fused).build(catalog)(hidden, table, batch, None) for fused in (True, False)]
    assert losses[0] == losses[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for CUDA only")
def test_the_kernel_against_the_plain_form() -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(root / "tests" / "fused_losses.py")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, differences in json.loads(done.stdout.splitlines()[-1]).items():
        assert max(differences) < (1e-2 if case == "bf16" else 1e-5), case
