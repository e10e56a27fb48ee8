"""Joining a cluster that is not there is refused at once, in words."""

from __future__ import annotations

import socket

import pytest

from actors.errors import ConfigError
from pipelines.cluster import join


def test_an_address_where_nothing_listens_is_refused_by_name():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"cluster.address={address}: no Ray cluster.*ray start --head"):
        join(address)
