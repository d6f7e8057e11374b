"""Where one executor's KV goes when it is swapped out: a host pool and the copier between it and the device
pool, made and closed together."""

from dataclasses import dataclass

from llumnix.core.config import SwapConfig
from llumnix.instance.kv_pool import KvPool, host_pool
from llumnix.instance.swap_copier import SwapCopier


@dataclass(frozen=True, slots=True, eq=False)
class SwapSpace:
    """See the module."""

    pool: KvPool
    copier: SwapCopier

    @classmethod
    def beside(cls, device_pool: KvPool, config: SwapConfig | None) -> "SwapSpace | None":
        """For a device pool that holds nothing yet; None if swapping is off. Raises ConfigurationError."""
        pool = None if config is None else host_pool(config, device_pool)
        if config is None or pool is None:
            return None
        return cls(pool, SwapCopier(device_pool, pool, config))

    def close(self) -> None:
        """Stop copying and give the memory up. The device pool is the caller's."""
        self.copier.close()
        self.pool.close()
