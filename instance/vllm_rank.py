"""A rank's side of its instance: one process of a tensor-parallel vLLM, with a device of its own and on it
its own heads of every KV block.

It says how its KV lies, maps the instance's pool, and then copies its heads between the two when it is told
to, on threads of its own, so that decoding goes on. When the line to the instance ends, so does this process,
at once, whatever it is doing: a rank whose peer has died may wait for it in a collective for ever. Made by
vllm_rank_worker.py; used by the connector (vllm_connector.py), which vLLM makes later in the same process.
"""

import logging
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

from llumnix.core.errors import ConfigurationError, InvariantError, ProtocolError, TransportError
from llumnix.core.messages.control import KvLayout
from llumnix.core.messages.ranks import CopyDone, CopyOrder, PoolOffered, RankFailed, RankHello, RankReady
from llumnix.instance.kv_pool import DTYPES
from llumnix.instance.vllm_exchange import Load
from llumnix.instance.vllm_heads import HeadsOfRank, heads_of_rank
from llumnix.instance.vllm_layout import KvCopier
from llumnix.instance.vllm_rank_line import Line, address_of
from llumnix.instance.vllm_shared_names import meeting_file, take_away_of_rank
from llumnix.kernels.cpu.huge_pages import map_shared

log = logging.getLogger(__name__)

COPY_THREADS = 4
POOL_TIMEOUT_S = 120.0
"""A bound only: the instance answers, or the line ends."""
REASON_CHARS_MAX = 500


@dataclass(frozen=True, slots=True)
class PoolPart:
    """The pool as a rank sees it: ``tensor`` is ``[blocks, layers, 2, heads of this rank, block_size,
    head_dim]``. ``layout`` is the whole pool's."""

    layout: KvLayout
    tensor: torch.Tensor


class Rank:
    """See the module. ``init_method`` is what vLLM has told the ranks to meet by. Raises TransportError if
    there is no instance."""

    def __init__(self, pool_name: str, rank: int, ranks: int, init_method: str) -> None:
        self._rank, self._ranks = rank, ranks
        self._met_in = meeting_file(init_method)
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            end.connect(address_of(pool_name))
        except OSError as error:
            raise TransportError(f"there is no instance with pool {pool_name}: {error}") from error
        self._line = Line(end)
        self._offer: Future[None] = Future()
        self._pool: PoolPart | None = None
        self._copier: KvCopier | None = None
        self._copiers = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-copy")
        self._line.send(RankHello(rank))
        threading.Thread(target=self._listen, name="instance", daemon=True).start()

    def tell(self, error: BaseException) -> None:
        """Let the instance know why this rank does not start, and leave no names: vLLM itself only logs it
        here, and ends this process some time."""
        text = " ".join(str(error).split())[:REASON_CHARS_MAX]
        self._line.send(RankFailed(text or type(error).__name__))
        take_away_of_rank(self._met_in)

    def leave(self, status: int) -> NoReturn:
        """End this process at once."""
        with suppress(OSError):
            take_away_of_rank(self._met_in)
        os._exit(status)

    def heads(self, kv_heads: int) -> HeadsOfRank:
        """Which of a model's KV heads are here."""
        return heads_of_rank(self._rank, self._ranks, kv_heads)

    @property
    def pool(self) -> PoolPart:
        """This rank's part of the pool."""
        if self._pool is None:
            raise InvariantError("vLLM has not told about its KV yet")
        return self._pool

    @property
    def copier(self) -> KvCopier:
        """The way in and out of this rank's KV."""
        if self._copier is None:
            raise InvariantError("vLLM has not told about its KV yet")
        return self._copier

    def know(self, layout: KvLayout, copier: KvCopier) -> None:
        """vLLM has its KV: get the pool, whose ``layout`` this is but for its blocks. Raises
        ConfigurationError if there is none."""
        self._copier = copier
        self._line.send(RankReady(copier.shape.blocks, copier.shape.block_size, layout))
        self._offer.result(POOL_TIMEOUT_S)

    def take_in(self, load: Load) -> None:
        """Fill this rank's part of a request's blocks in vLLM from the pool."""
        self.copier.copy_in(self.pool, load.pool_blocks, load.blocks, first=load.first, end=load.end)

    def _listen(self) -> None:
        try:
            while (message := self._line.receive()) is not None:
                self._heard(message)
        except (ProtocolError, TransportError):
            log.exception("the line to the instance broke")
        finally:
            self.leave(1)

    def _heard(self, message: object) -> None:
        if isinstance(message, PoolOffered):
            self._map(message)
        elif isinstance(message, CopyOrder):
            job = self._copiers.submit(self._copy, message)
            job.add_done_callback(partial(self._copied, message.number))
        else:
            raise ProtocolError(f"a rank was told {type(message).__name__}")

    def _map(self, offered: PoolOffered) -> None:
        if offered.reason:
            self._offer.set_exception(ConfigurationError(offered.reason))
            return
        layout, fd = offered.layout, self._line.receive_fd()
        try:
            flat = map_shared(fd, layout.blocks * layout.block_bytes)
        finally:
            os.close(fd)
        shape = (layout.blocks, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        mine = self.heads(layout.kv_heads)
        whole = flat.view(DTYPES[layout.dtype]).view(shape)
        self._pool = PoolPart(
            layout, whole.narrow(3, mine.first, mine.count)
        )  # copies may be ordered at once
        self._offer.set_result(None)

    def _copy(self, order: CopyOrder) -> None:
        blocks, pool_blocks, ends = order.vllm_blocks, order.pool_blocks, (order.first, order.end)
        with torch.inference_mode():
            if order.outward:
                self.copier.copy_out(self.pool, blocks, pool_blocks, first=ends[0], end=ends[1])
            else:
                self.copier.copy_in(self.pool, pool_blocks, blocks, first=ends[0], end=ends[1])

    def _copied(self, number: int, done: "Future[None]") -> None:
        error = done.exception()
        self._line.send(CopyDone(number, "" if error is None else f"rank {self._rank} of vLLM: {error}"))


_joined: list[Rank] = []


def join(pool_name: str, rank: int, ranks: int, init_method: str = "") -> Rank:
    """Make this process a rank."""
    _joined[:] = [Rank(pool_name, rank, ranks, init_method)]
    return _joined[0]


def joined() -> Rank:
    """The rank this process is."""
    if not _joined:
        raise InvariantError("this process is no rank of an instance")
    return _joined[0]
