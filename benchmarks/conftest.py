"""Tables after the CPU benchmarks: what pytest-benchmark's own tables do not show."""

from __future__ import annotations

import pytest

from benchmarks import compare, compare_pairs, compare_swd, memory

ROWS, SWD_ROWS, PAIR_ROWS = (pytest.StashKey[list]() for _ in range(3))


def pytest_configure(config):
    for key in (ROWS, SWD_ROWS, PAIR_ROWS):
        config.stash[key] = []


@pytest.fixture
def rows(request) -> list[dict]:
    """The rows of the closing table of nt_xent."""
    return request.config.stash[ROWS]


@pytest.fixture
def swd_rows(request) -> list[dict]:
    """The rows of the closing table of the sorts."""
    return request.config.stash[SWD_ROWS]


@pytest.fixture
def pair_rows(request) -> list[dict]:
    """The rows of the closing table of CLIP and the others."""
    return request.config.stash[PAIR_ROWS]


@pytest.fixture(scope="session")
def peaks() -> dict[memory.Case, int]:
    """Peak extra bytes measured so far, so that each case is measured once."""
    return {}


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("nt_xent against eager PyTorch and the floor, interleaved")
        terminalreporter.write_line(compare.markdown(config.stash[ROWS]))
    if config.stash[SWD_ROWS]:
        terminalreporter.section("sorts and swd_loss against plain PyTorch and POT, interleaved")
        terminalreporter.write_line(compare_swd.markdown(config.stash[SWD_ROWS]))
    if config.stash[PAIR_ROWS]:
        terminalreporter.section("CLIP, SigLIP, InfoNCE with a queue and SupCon against plain PyTorch, interleaved")
        terminalreporter.write_line(compare_pairs.markdown(config.stash[PAIR_ROWS]))
