import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.packing import Pack, faults, pack


def next_fit_by_loops(lengths: list[int], row_length: int) -> list[list[tuple]]:
    """The rule as it is said: rows of (start, stop) token ranges."""
    rows, room, token = [], 0, 0
    for length in lengths:
        end = token + length
        while token < end:
            piece = min(row_length, end - token)
            if piece > room:
                rows.append([])
                room = row_length
            rows[-1].append((token, token + piece))
            room -= piece
            token += piece
    return rows


def as_lists(index: Pack) -> list[list[tuple]]:
    return [
        [
            (int(index.pieces[p]), int(index.pieces[p + 1]))
            for p in range(index.rows[r], index.rows[r + 1])
        ]
        for r in range(index.num_rows)
    ]


@pytest.mark.fast
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum),
    row_length=st.integers(1, 17),
)
def test_packing_is_next_fit(lengths, row_length):
    index = pack(np.cumsum([0, *lengths]), row_length)
    assert as_lists(index) == next_fit_by_loops(lengths, row_length)
    assert faults(index, sum(lengths)) == []


@pytest.mark.fast
def test_packing_by_hand():
    # Rows of 10: 6+3 fit, 4 does not; 4 then 10+10+1 of the 21; 1+2 share the last.
    index = pack(np.asarray([0, 6, 9, 13, 34, 36]), 10)
    assert index.pieces.tolist() == [0, 6, 9, 13, 23, 33, 34, 36]
    assert index.rows.tolist() == [0, 2, 3, 4, 5, 7]
    assert index.padding_fraction == pytest.approx(1 - 36 / 50)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("pieces", "rows", "fault"),
    [
        ([0, 4, 9], [0, 1, 2], "end at token 9"),
        ([0, 4, 8], [0, 1], "every piece"),
        ([0, 4, 4, 8], [0, 2, 3], "do not rise"),
        ([0, 4, 8], [0, 2], "more than 6 tokens"),
        ([0], [0], "no rows"),
    ],
)
def test_an_index_of_other_data_is_noticed(pieces, rows, fault):
    assert fault in faults(Pack(6, np.asarray(pieces), np.asarray(rows)), 8)[0]


def test_a_million_documents_pack_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 800, 1_000_000)
    start = time.perf_counter()
    index = pack(np.concatenate([[0], np.cumsum(lengths)]), 512)
    assert time.perf_counter() - start < 10
    assert faults(index, int(lengths.sum())) == []
