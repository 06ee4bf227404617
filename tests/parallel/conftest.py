"""The gang of this folder's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()
