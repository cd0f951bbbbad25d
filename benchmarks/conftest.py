"""One table after the CPU benchmarks: what pytest-benchmark's own tables do not show."""

from __future__ import annotations

import pytest

from benchmarks import compare, memory

ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def rows(request) -> list[dict]:
    """The rows of the closing table."""
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def peaks() -> dict[memory.Case, int]:
    """Peak extra bytes measured so far, so that each case is measured once."""
    return {}


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("nt_xent against eager PyTorch and the floor, interleaved")
        terminalreporter.write_line(compare.markdown(config.stash[ROWS]))
