import pytest
import torch

from metakern.data.noise import NOISE_KINDS, corrupt, flip_matrix, hierarchical_matrix, noise_matrix

GROUPS = torch.tensor([0, 0, 1, 1, 1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_rows_are_distributions(kind, rate):
    matrix = noise_matrix(kind, 5, rate, generator(), groups=GROUPS)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(5, dtype=torch.float64))
    if rate == 0:
        assert torch.equal(matrix, torch.eye(5, dtype=torch.float64))


def test_matrices_by_hand():
    uniform, symmetric = (noise_matrix(kind, 5, 0.4, generator()) for kind in ("uniform", "symmetric"))
    assert uniform[0].tolist() == pytest.approx([0.68, 0.08, 0.08, 0.08, 0.08])
    assert symmetric[0].tolist() == pytest.approx([0.6, 0.1, 0.1, 0.1, 0.1])
    flip, flip2 = (noise_matrix(kind, 5, 0.4, generator()) for kind in ("flip", "flip2"))
    for row in range(5):
        assert sorted(flip[row].tolist()) == pytest.approx([0, 0, 0, 0.4, 0.6])
        assert flip[row, row] == 0.6
        assert sorted(flip2[row].tolist()) == pytest.approx([0, 0, 0.2, 0.2, 0.6])
        assert flip2[row, row] == 0.6
    background = noise_matrix("background", 5, 0.4, generator())
    column = int(background.sum(0).argmax())
    expected = 0.6 * torch.eye(5, dtype=torch.float64)
    expected[:, column] += 0.4
    torch.testing.assert_close(background, expected)


def test_hierarchical_stays_in_the_group():
    matrix = hierarchical_matrix(torch.tensor([0, 0, 0, 1, 1, 2]), 0.3)
    assert matrix[0].tolist() == pytest.approx([0.7, 0.15, 0.15, 0, 0, 0])
    assert matrix[3].tolist() == pytest.approx([0, 0, 0, 0.7, 0.3, 0])
    assert matrix[5].tolist() == [0, 0, 0, 0, 0, 1]
    assert torch.equal(
        noise_matrix("hierarchical", 5, 0.3, generator(), groups=GROUPS), hierarchical_matrix(GROUPS, 0.3)
    )


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_drawn_labels_follow_the_matrix(kind):
    targets = torch.arange(4).repeat(20000)
    matrix = noise_matrix(kind, 4, 0.3, generator(), groups=GROUPS[1:])
    noisy = corrupt(targets, matrix, generator())
    seen = torch.zeros(4, 4, dtype=torch.float64).index_put_(
        (targets, noisy), torch.ones(len(targets), dtype=torch.float64), accumulate=True
    )
    # Four standard deviations of a share out of 20000.
    torch.testing.assert_close(seen / 20000, matrix, atol=4 * (0.25 / 20000) ** 0.5, rtol=0)


def test_seeded_and_pure():
    targets = torch.arange(4).repeat(50)
    kept = targets.clone()
    matrix = noise_matrix("uniform", 4, 0.5, generator())
    first, again, other = (corrupt(targets, matrix, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(targets, kept)
    assert len(corrupt(targets[:0], matrix, generator())) == 0


def test_refusals():
    with pytest.raises(
        ValueError, match="unknown noise 'pink'; there are: uniform, symmetric, flip, flip2, background, hierarchical"
    ):
        noise_matrix("pink", 4, 0.1, generator())
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        noise_matrix("uniform", 4, 1.5, generator())
    with pytest.raises(ValueError, match=r"it needs groups\[4\], got none"):
        noise_matrix("hierarchical", 4, 0.1, generator())
    with pytest.raises(ValueError, match=r"it needs groups\[4\], got groups of 5 classes"):
        noise_matrix("hierarchical", 4, 0.1, generator(), groups=GROUPS)
    with pytest.raises(ValueError, match="each of 4 is alone in its group"):
        noise_matrix("hierarchical", 4, 0.1, generator(), groups=torch.arange(4))
    with pytest.raises(ValueError, match="partners must be 1 to 1 for 2 classes, got 2"):
        flip_matrix(2, 0.1, generator(), partners=2)
    with pytest.raises(ValueError, match="must be square"):
        corrupt(torch.tensor([0]), torch.ones(2, 3), generator())
    with pytest.raises(ValueError, match="must sum to 1"):
        corrupt(torch.tensor([0]), torch.ones(2, 2), generator())
