import pytest
import torch

from recsys.models.dropout import COINS, Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1000, 1001))
    kept = round((1 - p) * COINS) / COINS
    deviation = (kept * (1 - kept) / y.numel()) ** 0.5
    assert abs((y != 0).double().mean() - kept) < 4 * deviation
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / kept]))


def test_coins_are_independent_of_their_place() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(250_000, 4)) != 0).double()
    assert ((kept.mean(0) - 0.5).abs() < 0.005).all()
    assert (torch.corrcoef(kept.t()) - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (0, 8), ()])
def test_the_gradient_passes_where_the_value_did(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_off_in_evaluation_and_at_zero() -> None:
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_a_probability_near_zero_or_one_keeps_its_meaning() -> None:
    assert (Dropout(1e-9)(torch.ones(1000)) == 0).sum() <= 5
    assert (Dropout(1 - 1e-9)(torch.ones(1000)) != 0).sum() <= 5


def test_one_seed_one_mask() -> None:
    x = torch.ones(33, 3)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(Dropout(0.3)(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
