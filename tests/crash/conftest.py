"""One server for all tests, and at the end of a run how often each fault point was hit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.crash.history import Server

HITS = "fault points hit"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def hits(record_property: pytest.RecordProperty) -> Iterator[Counter[str]]:
    """`role: point` -> how often it ended (or stopped, or failed) a process; told at the end of the run."""
    found: Counter[str] = Counter()
    yield found
    record_property(HITS, json.dumps(found))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in (
                getattr(report, "user_properties", ()) if getattr(report, "when", "") == "teardown" else ()
            ):
                if name == HITS:
                    _tell(terminalreporter, report.nodeid, json.loads(value))


def _tell(terminal: pytest.TerminalReporter, test: str, hits: dict[str, int]) -> None:
    terminal.section(f"fault points hit by {test.rsplit('::', 1)[-1]}")
    texts = [f"{point} {times}" for point, times in sorted(hits.items())]
    for first in range(0, len(texts), 4):
        terminal.write_line("  ".join(f"{text:36s}" for text in texts[first : first + 4]))
    terminal.write_line(f"{len(hits)} points, {sum(hits.values())} hits")
