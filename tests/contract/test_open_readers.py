"""Readers that an instance keeps open: a host that does not answer holds up nobody else."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from llumnix.core.config import MigrationConfig
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint, KvLayout
from llumnix.instance.kv_pool import KvPool
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.base import host_identity
from llumnix.migration.transports.factory import Readers
from llumnix.runtime.open_readers import READERS_MAX, OpenReaders

TIMEOUT_S = 20.0
LAYOUT = KvLayout(8, layers=1, kv_heads=1, block_size=4, head_dim=8, dtype="float32")


@contextmanager
def pools() -> Iterator[tuple[KvPool, KvEndpoint]]:
    """Our own pool, and one of this process to read from."""
    source, target = (KvPool(LAYOUT, name, torch.device("cpu")) for name in ("open-source", "open-target"))
    inprocess.offer(source)
    yield target, KvEndpoint(host_identity(), os.getpid(), source.fd, "open-source", "")
    inprocess.withdraw(source)
    source.close()
    target.close()


def test_a_host_that_does_not_answer_holds_up_no_other_read() -> None:
    mute = socket.create_server(("127.0.0.1", 0))  # takes connections and says nothing
    silent = KvEndpoint("elsewhere", 1, -1, "silent", f"tcp://127.0.0.1:{mute.getsockname()[1]}")
    errors: list[TransportError] = []
    with pools() as (target, near):
        readers = OpenReaders(Readers(target, MigrationConfig()))

        def wait_for_it() -> None:
            with pytest.raises(TransportError) as caught:
                readers.get(silent)
            errors.append(caught.value)

        waiting = [threading.Thread(target=wait_for_it) for _ in range(2)]
        for thread in waiting:
            thread.start()
        readers.get(near).read([1, 2], [3, 4], TIMEOUT_S)
        readers.close("open-source")
        assert not errors, "the read waited until the silent host was given up"
        for thread in waiting:
            thread.join()
        assert len(errors) == 2
        mute.close()
        with pytest.raises(TransportError, match="silent"):  # tried anew, and refused at once
            readers.get(silent)
        readers.close_all()


def test_a_reader_is_opened_once_and_again_after_it_was_closed() -> None:
    with pools() as (target, near):
        readers = OpenReaders(Readers(target, MigrationConfig()))
        reader = readers.get(near)
        assert readers.get(near) is reader
        readers.close(near.pool_name)
        with pytest.raises(TransportError, match="closed"):
            reader.read([1], [1], TIMEOUT_S)
        again = readers.get(near)
        assert again is not reader
        again.read([1], [1], TIMEOUT_S)
        readers.close_all()
        with pytest.raises(TransportError, match="closed"):
            again.read([1], [1], TIMEOUT_S)


def test_the_reader_opened_first_goes_for_a_new_one() -> None:
    with pools() as (target, near):
        readers = OpenReaders(Readers(target, MigrationConfig()))
        first = readers.get(near)
        others = []
        for number in range(READERS_MAX):
            pool = KvPool(LAYOUT, f"open-{number}", torch.device("cpu"))
            inprocess.offer(pool)
            others.append(pool)
            readers.get(replace(near, pool_name=pool.pool_name))
        with pytest.raises(TransportError, match="closed"):
            first.read([1], [1], TIMEOUT_S)
        readers.close_all()
        for pool in others:
            inprocess.withdraw(pool)
            pool.close()
