"""The row ledger: a host that gets only the updates has the owner's rows, and gets nothing twice."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kunserve_sgl.exchange.row_ledger import RowLedger, apply_update

ROWS, WIDTH = 12, 40
HOSTS = (1, 2, 5)


class Model:
    """The same bookkeeping, entry by entry, and every host's table."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], int] = {}
        self.tables = {host: np.zeros((ROWS, WIDTH), np.int32) for host in HOSTS}

    def cut(self, row: int, start: int) -> None:
        for host in HOSTS:
            self.known[host, row] = min(self.known.get((host, row), 0), start)


def send(ledger: RowLedger, model: Model, table: np.ndarray, host: int, rows: list[int], lengths: list[int]) -> None:
    starts, values = ledger.update_for(host, np.array(rows), np.array(lengths), table)
    assert starts.dtype == values.dtype == np.int32
    expected = [min(model.known.get((host, row), 0), length) for row, length in zip(rows, lengths, strict=True)]
    assert starts.tolist() == expected
    assert len(values) == sum(lengths) - sum(expected)
    apply_update(model.tables[host], np.array(rows), starts, np.array(lengths), values)
    for row, length in zip(rows, lengths, strict=True):
        assert (model.tables[host][row, :length] == table[row, :length]).all()
        model.known[host, row] = max(model.known.get((host, row), 0), length)


@pytest.mark.parametrize("seed", range(30))
def test_random_changes_against_a_naive_model(seed: int) -> None:
    chance = random.Random(seed)
    table = np.zeros((ROWS, WIDTH), np.int32)
    ledger, model = RowLedger(ROWS), Model()
    for step in range(1, 400):
        action = chance.random()
        row = chance.randrange(ROWS)
        if action < 0.6:
            rows = chance.sample(range(ROWS), chance.randrange(1, ROWS))
            send(ledger, model, table, chance.choice(HOSTS), rows, [chance.randrange(WIDTH + 1) for _ in rows])
        elif action < 0.75:
            start = chance.randrange(WIDTH)
            table[row, start:] = step
            ledger.rewritten(row, start)
            model.cut(row, start)
        elif action < 0.9:
            rows = chance.sample(range(ROWS), 3)
            starts = [chance.randrange(WIDTH) for _ in rows]
            for each, start in zip(rows, starts, strict=True):
                table[each, start] = step
                model.cut(each, start)
            ledger.rewritten_from(np.array(rows), np.array(starts))
        elif action < 0.95:
            table[row] = step
            ledger.forget_rows([row])
            model.cut(row, 0)
        else:
            host = chance.choice(HOSTS)
            model.tables[host][:] = -1
            for each in range(ROWS):
                model.known[host, each] = 0
            ledger.forget(host)
        assert ledger.longest_known(row) == max(model.known.get((host, row), 0) for host in HOSTS)


def test_decode_sends_one_entry_per_request() -> None:
    table = np.arange(ROWS * WIDTH, dtype=np.int32).reshape(ROWS, WIDTH)
    ledger = RowLedger(ROWS)
    rows = np.array([3, 1, 7])
    assert ledger.is_empty
    starts, values = ledger.update_for(1, rows, np.array([4, 2, 1]), table)
    assert starts.tolist() == [0, 0, 0]
    assert values.tolist() == [*table[3, :4], *table[1, :2], table[7, 0]]
    starts, values = ledger.update_for(1, rows, np.array([5, 3, 2]), table)
    assert starts.tolist() == [4, 2, 1]
    assert values.tolist() == [table[3, 4], table[1, 2], table[7, 1]]
    assert not ledger.is_empty
    starts, values = ledger.update_for(1, rows, np.array([5, 3, 2]), table)
    assert starts.tolist() == [5, 3, 2]
    assert values.size == 0


def test_hosts_are_known_by_themselves() -> None:
    table = np.zeros((ROWS, WIDTH), np.int32)
    ledger = RowLedger(ROWS)
    ledger.update_for(1, np.array([2]), np.array([9]), table)
    assert ledger.update_for(2, np.array([2]), np.array([9]), table)[0].tolist() == [0]
    ledger.forget(1)
    assert ledger.longest_known(2) == 9
    ledger.clear()
    assert ledger.is_empty
    assert ledger.longest_known(2) == 0


@pytest.mark.parametrize("seed", range(30))
def test_steps_that_only_append_are_booked_whatever_comes_between(seed: int) -> None:
    """A step is compared with the one before it, and booked when something else is asked or changed."""
    chance = random.Random(seed)
    table, ledger, known = np.zeros((ROWS, WIDTH), np.int32), RowLedger(ROWS), {}
    rows, lengths = np.array([0], np.int32), np.array([1], np.int32)
    for _ in range(400):
        action, row, host = chance.random(), chance.randrange(ROWS), chance.choice(HOSTS[:2])
        if action < 0.75 and int(lengths.max()) < WIDTH:
            prefixes, lengths = lengths, lengths + np.int32(1)
            appends = all(known.get((host, r), 0) >= p for r, p in zip(rows.tolist(), prefixes.tolist(), strict=True))
            assert ledger.appends(host, rows, lengths, prefixes) == appends
            if not appends:
                ledger.update_for(host, rows, lengths, table)
            for r, length in zip(rows.tolist(), lengths.tolist(), strict=True):
                known[host, r] = length if appends else max(known.get((host, r), 0), length)
        elif action < 0.8:
            start = chance.randrange(WIDTH)
            chance.choice([ledger.rewritten, lambda r, s: ledger.rewritten_from(np.array([r]), np.array([s]))])(
                row, start
            )
            known = {key: min(length, start) if key[1] == row else length for key, length in known.items()}
        elif action < 0.85:
            ledger.forget_rows([row])
            known = {key: length for key, length in known.items() if key[1] != row}
        elif action < 0.9:
            ledger.forget(host)
            known = {key: length for key, length in known.items() if key[0] != host}
        elif action < 0.95:
            rows = np.array(chance.sample(range(ROWS), chance.randrange(1, 4)), np.int32)
            lengths = np.array([chance.randrange(1, WIDTH // 2) for _ in rows], np.int32)
        else:
            assert ledger.longest_known(row) == max(known.get((each, row), 0) for each in HOSTS)
