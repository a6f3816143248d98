"""The Hub on localhost, for tests that publish or pull."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def hub_server() -> ModuleType:
    """The module tests/hub_server.py, which is no package that could be imported by name."""
    path = Path(__file__).parents[1] / "hub_server.py"
    spec = importlib.util.spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(hub_server: ModuleType) -> Iterator[object]:
    """A running Hub without repositories."""
    with hub_server.running_hub() as running:
        yield running
