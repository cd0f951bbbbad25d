"""Measures each case once for all its sides, and keeps what describes the machine and the measurement in the JSON."""

from __future__ import annotations

import functools

import pytest

from benchmarks import peers, reporting, suite, suite_report


ENTRIES = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[ENTRIES] = []


@pytest.fixture
def entries(request) -> list[dict]:
    """What the closing tables are made of."""
    return request.config.stash[ENTRIES]


class Clock:
    """Shows the time that was added to it: what was measured before is played back to pytest-benchmark."""

    def __init__(self):
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def selected(session: pytest.Session) -> dict[suite.Case, list[str]]:
    """{case: sides} of the tests that were asked for."""
    found: dict[suite.Case, list[str]] = {}
    for item in session.items:
        if "case" in getattr(item, "callspec", type("", (), {"params": {}})).params:
            found.setdefault(item.callspec.params["case"], []).append(item.callspec.params["side"])
    return found


@pytest.fixture(scope="session")
def measured(request):
    """A function of a case: everything about its sides, measured at the first call."""
    wanted = selected(request.session)
    return functools.cache(lambda case: suite.measure(case, wanted[case]))


@pytest.fixture(scope="session")
def peaks(request):
    """A function: peak extra bytes by case and side, measured at the first call."""
    return functools.cache(lambda: suite.peaks(selected(request.session)))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What was measured and with what; nothing about the repository or the name of the machine."""
    info = output_json["machine_info"]
    cpu = {key: info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    output_json["machine_info"] = {"cpu": cpu, "system": info["system"]} | reporting.versions()
    output_json["machine_info"] |= {"peers": peers.versions(), "ceilings": suite.ceilings()}
    for key in ("commit_info", "version"):
        output_json.pop(key, None)
    for entry in output_json["benchmarks"]:
        for key in ("params", "param", "options"):
            entry.pop(key, None)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ENTRIES]:
        terminalreporter.section("all sides in turns, in one process")
        entries, versions = config.stash[ENTRIES], peers.versions()
        terminalreporter.write_line(suite_report.table(entries, suite.ceilings(), versions))
        terminalreporter.write_line(suite_report.targets(entries))
        terminalreporter.write_line("\n".join(suite_report.missing(versions)))
