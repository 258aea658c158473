import numpy as np
import pytest

from tasks.permutation import permute


@pytest.mark.fast
@pytest.mark.parametrize("size", [*range(1, 66), 1000, 4097])
def test_permutation_is_a_bijection(size):
    visited = permute(np.arange(size), size, 7, 1)
    assert sorted(visited.tolist()) == list(range(size))


@pytest.mark.fast
def test_permutation_depends_on_every_key_and_not_on_company():
    size = 5000
    index = np.arange(size)
    base = permute(index, size, 7, 1)
    for key in ((7, 2), (8, 1), (71,)):
        # Two random permutations agree in one place on average.
        assert (permute(index, size, *key) == base).sum() < 12
    one_by_one = [int(permute(np.asarray([i]), size, 7, 1)[0]) for i in range(50)]
    assert one_by_one == base[:50].tolist()


@pytest.mark.fast
def test_permutation_has_no_visible_order():
    size = 20_000
    visited = permute(np.arange(size), size, 3)
    # A correlation of n random pairs has a standard deviation of 1/√n = 0.007.
    assert abs(np.corrcoef(np.arange(size), visited)[0, 1]) < 0.03
    assert abs(np.corrcoef(visited[1:], visited[:-1])[0, 1]) < 0.03


@pytest.mark.fast
def test_permutation_of_a_trillion():
    size = 10**12 + 39
    index = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    visited = permute(index, size, 0)
    assert visited.min() >= 0
    assert visited.max() < size
    assert len(set(visited.tolist())) == 2000
    # Spread over the whole range: its quarters hold about 500 each.
    quarters = np.bincount(visited // (size // 4 + 1), minlength=4)
    assert quarters.min() > 400
