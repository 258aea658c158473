import gzip
import math

import numpy as np
import pytest

from tasks.baselines import baselines, unigram_nats


@pytest.mark.fast
def test_unigram_by_hand():
    # Train counts 3, 0, 1 become 4/7, 1/7, 2/7. Held out: token 0 twice, token 1 once.
    nats = unigram_nats(np.asarray([3, 0, 1]), np.asarray([2, 1, 0]))
    assert nats == pytest.approx(-(2 * math.log(4 / 7) + math.log(1 / 7)))


@pytest.mark.fast
def test_baselines_are_per_token_and_per_byte():
    text = b"the quick brown fox " * 50
    found = baselines(np.asarray([1, 1]), np.asarray([6, 2]), len(text), text)
    # Two equally likely tokens cost one bit each; 8 tokens stand for 1,000 bytes.
    assert found["unigram_nats_per_token"] == pytest.approx(math.log(2))
    assert found["unigram_bits_per_byte"] == pytest.approx(8 / 1000)
    size = len(gzip.compress(text, 9))
    assert found["gzip_bits_per_byte"] == pytest.approx(8 * size / 1000)
    assert 0 < found["xz_bits_per_byte"] < 8
    assert found["compressed_text_bytes"] == 1000
