"""The process of one rank as vLLM starts it: vLLM's own worker, by its public extension point ``worker_cls``,
which joins its instance before anything else, so that it ends with it, and tells it why it does not start.
Named in the engine's arguments by vllm_launch.py.
"""

from types import TracebackType
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from llumnix.instance.vllm_exchange import EXCHANGE
from llumnix.instance.vllm_rank import Rank, join, joined

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class _Telling:
    """What is raised in a block is told to the instance on the way out."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._rank.tell(error)


class RankWorker(Worker):  # type: ignore[misc]
    """See the module."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        pool_name = vllm_config.kv_transfer_config.kv_connector_extra_config[EXCHANGE]
        ranks = vllm_config.parallel_config.tensor_parallel_size
        rank_here = join(pool_name, rank, ranks, distributed_init_method)
        self._llumnix = _Telling(rank_here)
        with self._llumnix:
            super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    def init_device(self) -> Any:
        with self._llumnix:
            return super().init_device()

    def load_model(self, **kwargs: Any) -> Any:
        with self._llumnix:
            return super().load_model(**kwargs)

    def shutdown(self) -> None:
        """vLLM is done with this process, which left to itself takes seconds to end."""
        super().shutdown()
        joined().leave(0)
