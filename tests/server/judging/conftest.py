"""A server whose attributes have probes, and its client."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from steerserve.server.service import Service
from tests.server.probed import probed_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return probed_service(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service, ServerConfig())) as opened:
        yield opened
