"""What every transport promises, checked on each: bytes arrive where they should, errors come as
TransportError and in time, and the bandwidth cap counts every byte."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import pytest
import torch
import zmq

from llumnix.core.config import MigrationConfig
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import KvEndpoint, KvLayout
from llumnix.instance.kv_pool import KvPool
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.bandwidth import BURST_S, TokenBucket
from llumnix.migration.transports.base import BlockReader, host_identity
from llumnix.migration.transports.factory import TRANSPORTS, Readers
from llumnix.migration.transports.runs import Run, plan_runs
from llumnix.migration.transports.zmq_server import BlockServer
from llumnix.migration.transports.zmq_wire import decode_answer, encode_answer

SOURCE_BLOCKS, TARGET_BLOCKS = 64, 48
CPU = torch.device("cpu")
TIMEOUT_S = 20.0


def layout(blocks: int) -> KvLayout:
    return KvLayout(blocks, layers=2, kv_heads=2, block_size=4, head_dim=8, dtype="float32")


def fill(pool: KvPool) -> torch.Tensor:
    pattern = torch.randint(
        0, 256, pool.bytes_view().shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(7)
    )
    pool.bytes_view().copy_(pattern)
    return pattern


def serve_pool(pipe: Connection, name: str) -> None:
    """A source in a process of its own: makes and fills a pool, serves it until told otherwise."""
    pool = KvPool(layout(SOURCE_BLOCKS), name, CPU)
    fill(pool)
    server = BlockServer((pool,), "127.0.0.1")
    pipe.send(KvEndpoint(host_identity(), os.getpid(), pool.fd, name, server.address))
    pipe.recv()
    server.close()


class OtherProcess:
    """A source process, killed at the end if not before."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["llumnix.migration.transports.factory"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_pool, args=(theirs, name), daemon=True)
        self.process.start()
        assert self._pipe.poll(60), "the source process did not start"
        self.endpoint: KvEndpoint = self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Pair:
    """A filled source pool, however far away, and a target that reads from it."""

    transport: str
    endpoint: KvEndpoint
    content: torch.Tensor
    target: KvPool

    def open(self, **settings: float) -> BlockReader:
        config = MigrationConfig(transport=self.transport, **settings)  # type: ignore[arg-type]
        return Readers(self.target, config).open(self.endpoint)


@pytest.fixture(scope="module")
def other_process() -> Iterator[OtherProcess]:
    other = OtherProcess("contract-far")
    yield other
    other.kill()


@pytest.fixture(params=list(TRANSPORTS))
def pair(request: pytest.FixtureRequest, other_process: OtherProcess) -> Iterator[Pair]:
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    if request.param != "inprocess":
        local = KvPool(layout(SOURCE_BLOCKS), "pattern", CPU)
        content = fill(local).clone()
        local.close()
        yield Pair(request.param, other_process.endpoint, content, target)
    else:
        source = KvPool(layout(SOURCE_BLOCKS), "contract-near", CPU)
        inprocess.offer(source)
        endpoint = KvEndpoint(host_identity(), os.getpid(), source.fd, "contract-near", "tcp://127.0.0.1:1")
        yield Pair(request.param, endpoint, fill(source), target)
        inprocess.withdraw(source)
    target.close()


READS = {
    "one block": ([5], [9]),
    "one run": (list(range(10, 40)), list(range(3, 33))),
    "scattered": ([3, 9, 1, 60, 61, 2], [0, 7, 3, 20, 22, 4]),
    "descending": (list(range(20, 10, -1)), list(range(10))),
    "run on one side only": ([4, 5, 6, 7], [9, 8, 7, 6]),
    "all of the source that fits": (list(range(16, 64)), list(range(48))),
    "nothing": ([], []),
}


@pytest.mark.parametrize("blocks", READS.values(), ids=READS.keys())
def test_content_arrives_and_nothing_else_changes(pair: Pair, blocks: tuple[list[int], list[int]]) -> None:
    source_blocks, target_blocks = blocks
    expected = torch.full_like(pair.target.bytes_view(), 0xA5)
    pair.target.bytes_view().copy_(expected)
    expected[target_blocks] = pair.content[source_blocks]
    reader = pair.open()
    stats = reader.read(source_blocks, target_blocks, TIMEOUT_S)
    reader.close()
    assert torch.equal(pair.target.bytes_view(), expected)
    assert stats.kv_bytes == len(source_blocks) * pair.target.layout.block_bytes
    assert stats.duration_s >= 0


def test_a_run_is_one_copy(pair: Pair) -> None:
    reader = pair.open()
    assert reader.read(range(10, 40), range(3, 33), TIMEOUT_S).copies == 1
    assert reader.read([0, 1, 5, 6], [0, 1, 2, 3], TIMEOUT_S).copies == 2
    reader.close()


@pytest.mark.parametrize(
    ("source_blocks", "target_blocks"),
    [
        ([SOURCE_BLOCKS], [0]),
        ([-1], [0]),
        ([0], [TARGET_BLOCKS]),
        ([0], [-1]),
        ([0, 1], [0]),
        ([1 << 31], [0]),
    ],
)
def test_wrong_blocks_are_refused(pair: Pair, source_blocks: list[int], target_blocks: list[int]) -> None:
    reader = pair.open()
    with pytest.raises(TransportError):
        reader.read(source_blocks, target_blocks, TIMEOUT_S)
    reader.read([0], [0], TIMEOUT_S)  # and the reader is none the worse for it
    assert torch.equal(pair.target.bytes_view()[0], pair.content[0])
    reader.close()


def test_a_closed_reader_reads_no_more(pair: Pair) -> None:
    reader = pair.open()
    reader.read([0], [0], TIMEOUT_S)
    reader.close()
    reader.close()
    with pytest.raises(TransportError, match="closed"):
        reader.read([0], [0], TIMEOUT_S)


def test_concurrent_reads_of_one_reader(pair: Pair) -> None:
    reader = pair.open()
    errors: list[TransportError] = []

    def read_share(share: int) -> None:
        blocks = range(share * 12, share * 12 + 12)
        try:
            for _ in range(20):
                reader.read(blocks, blocks, TIMEOUT_S)
        except TransportError as error:
            errors.append(error)

    threads = [threading.Thread(target=read_share, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert not errors
    assert torch.equal(pair.target.bytes_view(), pair.content[:TARGET_BLOCKS])


def test_a_capped_read_is_complete(pair: Pair) -> None:
    reader = pair.open(bandwidth_mib_s=8.0)
    reader.read(range(40), range(40), TIMEOUT_S)
    reader.close()
    assert torch.equal(pair.target.bytes_view()[:40], pair.content[:40])


def test_another_pool_of_that_name_is_not_taken(pair: Pair) -> None:
    pair.endpoint = replace(pair.endpoint, pool_name="somebody-else")
    with pytest.raises(TransportError, match="somebody-else"):
        pair.open()


def test_opening_a_source_that_is_gone_fails_at_once() -> None:
    other = OtherProcess("contract-gone")
    other.kill()
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    with pytest.raises(TransportError) as caught:
        Readers(target, MigrationConfig()).open(other.endpoint)
    for name in (*TRANSPORTS, "contract-gone"):  # what was tried, and for what
        assert name in str(caught.value)
    target.close()


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://127.0.0.1"])
def test_an_address_that_is_none_is_an_error_of_the_transport(address: str) -> None:
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    with pytest.raises(TransportError, match="no connection"):
        Readers(target, MigrationConfig(transport="zmq")).open(KvEndpoint("far", 1, -1, "far", address))
    target.close()


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_source_killed_between_reads_never_hangs_a_reader(transport: str) -> None:
    other = OtherProcess(f"contract-killed-{transport}")
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    reader = Readers(target, MigrationConfig(transport=transport)).open(other.endpoint)
    reader.read([3], [3], TIMEOUT_S)
    before = target.bytes_view()[3].clone()
    other.kill()
    if transport == "zmq":
        with pytest.raises(TransportError, match="closed the connection"):
            reader.read([3], [4], TIMEOUT_S)
    else:  # the mapping outlives the process: the bytes are still the right ones
        reader.read([3], [4], TIMEOUT_S)
        assert torch.equal(target.bytes_view()[4], before)
    reader.close()
    target.close()


class MuteServer:
    """Speaks the block server's protocol up to the first answer that matters, then does as told."""

    def __init__(self, after_ping: str) -> None:
        self._after_ping = after_ping
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = KvEndpoint("elsewhere", 1, -1, "mute", f"tcp://127.0.0.1:{port}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        reader, _, _ = self._socket.recv_multipart()
        self._socket.send_multipart([reader, encode_answer(1, ok=True), b""])
        reader, _, _ = self._socket.recv_multipart()
        if self._after_ping == "die":
            self._socket.close(linger=0)
        elif self._after_ping == "lie":
            self._socket.send_multipart([reader, encode_answer(2, ok=True), b"too short"])

    def close(self) -> None:
        self._thread.join()
        self._context.destroy(linger=0)


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [("die", "closed the connection"), ("silent", "said nothing"), ("lie", "not asked for")],
)
def test_a_source_that_fails_mid_read(behaviour: str, complaint: str) -> None:
    server = MuteServer(behaviour)
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    reader = Readers(target, MigrationConfig(transport="zmq")).open(server.endpoint)
    timeout_s = 0.1 if behaviour == "silent" else TIMEOUT_S
    with pytest.raises(TransportError, match=complaint):
        reader.read([0, 1], [0, 1], timeout_s)
    reader.close()
    server.close()
    target.close()


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"junk", b"pool"], [b"\0" * 20, b"contract-far"], [b"x"] * 5, [b"\xff" * 20, b"\xff\xfe"]],
)
def test_a_block_server_answers_nonsense_with_a_refusal(frames: list[bytes]) -> None:
    pool = KvPool(layout(SOURCE_BLOCKS), "contract-nonsense", CPU)
    server = BlockServer((pool,), "127.0.0.1")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(server.address)
        socket.send_multipart(frames)
        assert socket.poll(int(TIMEOUT_S * 1e3))
        header, text = socket.recv_multipart()
    assert decode_answer(header)[1] is False
    assert text
    assert server.refused == 1
    server.close()
    pool.close()


def test_auto_takes_the_fastest_that_reaches(other_process: OtherProcess) -> None:
    target = KvPool(layout(TARGET_BLOCKS), "contract-target", CPU)
    readers = Readers(target, MigrationConfig())
    near = readers.open(other_process.endpoint)
    far = readers.open(replace(other_process.endpoint, host="another machine"))
    assert type(near).__name__ == "MemoryReader"
    assert type(far).__name__ == "ZmqReader"
    for reader in (near, far):
        reader.read([0], [0], TIMEOUT_S)
        reader.close()
    target.close()


def test_runs_merge_only_what_ascends_on_both_sides() -> None:
    runs = plan_runs([4, 5, 6, 9, 8, 7], [0, 1, 2, 3, 4, 5], target_total=10, blocks_max=64)
    assert runs == [Run(4, 0, 3), Run(9, 3, 1), Run(8, 4, 1), Run(7, 5, 1)]
    halves = plan_runs(range(5), range(5), target_total=10, blocks_max=2)
    assert halves == [Run(0, 0, 2), Run(2, 2, 2), Run(4, 4, 1)]


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def test_the_cap_lets_through_its_rate_and_one_burst() -> None:
    time = FakeTime()
    bucket = TokenBucket(1000.0, clock=lambda: time.now, sleep=time.sleep)
    for _ in range(200):
        bucket.pass_bytes(50, urgent=False)
    assert time.slept == pytest.approx((200 * 50 - 1000.0 * BURST_S) / 1000.0)


def test_an_urgent_read_passes_at_once_and_later_ones_pay() -> None:
    time = FakeTime()
    bucket = TokenBucket(1000.0, clock=lambda: time.now, sleep=time.sleep)
    bucket.pass_bytes(550, urgent=True)
    assert time.slept == 0.0
    bucket.pass_bytes(100, urgent=False)
    assert time.slept == pytest.approx(0.6)


@pytest.mark.parametrize("copy_share", [1.0, 0.5])
def test_a_long_copy_past_the_caches_is_exact(copy_share: float) -> None:
    odd = replace(layout(4096), head_dim=9)  # blocks of 1152 bytes: no run ends where a page does
    source, target = (KvPool(odd, name, CPU) for name in ("long-source", "long-target"))
    content = fill(source)
    inprocess.offer(source)
    config = MigrationConfig(transport="inprocess", copy_share=copy_share)
    reader = Readers(target, config).open(
        KvEndpoint(host_identity(), os.getpid(), source.fd, "long-source", "")
    )
    blocks = [*range(7, 1500), *range(2000, 3001), 5, 3, 1]
    expected = torch.zeros_like(target.bytes_view())
    expected[1 : len(blocks) + 1] = content[blocks]
    stats = reader.read(blocks, range(1, len(blocks) + 1), TIMEOUT_S)
    assert torch.equal(target.bytes_view(), expected)
    assert stats.copies == 5
    assert 0 < stats.copying_s <= stats.duration_s
    reader.close()
    inprocess.withdraw(source)
    source.close()
    target.close()


def test_a_capped_reader_takes_every_byte_from_the_bucket() -> None:
    source, target = (KvPool(layout(8192), name, CPU) for name in ("cap-source", "cap-target"))
    inprocess.offer(source)
    endpoint = KvEndpoint(host_identity(), os.getpid(), source.fd, "cap-source", "")
    time = FakeTime()
    kv_bytes = 8192 * source.layout.block_bytes
    bucket = TokenBucket(kv_bytes / 4, clock=lambda: time.now, sleep=time.sleep)
    TRANSPORTS["inprocess"](endpoint, target, bucket, 1.0).read(range(8192), range(8192), TIMEOUT_S)
    inprocess.withdraw(source)
    assert time.slept == pytest.approx(4.0 - BURST_S, abs=0.1)
