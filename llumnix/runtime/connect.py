"""`llumnix.connect()`: a Python handle on a running cluster, for programs on any node of its Ray cluster.

Orders go to the manager's actor; text is generated through a frontend of the handle's own, so tokens come
straight from the instances.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from types import TracebackType
from typing import Any

from llumnix.api.backend import ModelInfo, StreamCall
from llumnix.api.detokenizer import TextStream
from llumnix.api.stream_state import Stream
from llumnix.api.tokenizer import TextTokenizer, load_tokenizer
from llumnix.core.admin import (
    ClusterSummary,
    DecisionRow,
    Event,
    InstanceRow,
    MigrationResult,
    PolicyState,
    Refusal,
)
from llumnix.core.codec import decode, encode
from llumnix.core.config import ClusterConfig, Config
from llumnix.core.epochs import epoch_at
from llumnix.core.errors import ConfigurationError, ProtocolError
from llumnix.core.messages.control import InstanceRole, RequestRow
from llumnix.core.messages.serving import FinishReason, Submit
from llumnix.core.request_names import id_of, name_at
from llumnix.core.sampling import GREEDY_ONLY, SEED_MAX, SamplingParams
from llumnix.runtime.actors import on_this_host
from llumnix.runtime.frontend import Frontend
from llumnix.runtime.launch import find_manager, start_ray
from llumnix.runtime.manager_actor import ClusterDescription
from llumnix.runtime.model_info import model_info
from llumnix.runtime.ray_admin import RayAdmin, ask_manager


@dataclass(frozen=True, slots=True)
class Generated:
    """The next piece of a text: new tokens, the text they complete, and, at the end, why it ended."""

    request_id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


async def connect(ray_address: str = "auto") -> "Cluster":
    """Connect to the Llumnix cluster of a Ray cluster: "auto" takes the one that RAY_ADDRESS names, or else
    the one started last on this machine; `llumnix serve` prints its address. Blocks for the second that
    joining Ray takes. Raises ConfigurationError if there is none, ManagerAway if its manager does not
    answer."""
    start_ray(Config(cluster=ClusterConfig(ray_address=ray_address)))
    manager = find_manager()
    if manager is None:
        raise ConfigurationError(
            f"the Ray cluster at {ray_address!r} runs no Llumnix; start one with: llumnix serve"
        )
    description: ClusterDescription = await ask_manager(manager, "describe")
    engine, frontend = description.config.engine, description.config.frontend
    model = await asyncio.to_thread(model_info, engine, frontend.served_model_name, description.max_model_len)
    tokenizer = await asyncio.to_thread(load_tokenizer, model.tokenizer_folder)
    return Cluster(description, RayAdmin(manager), model, tokenizer)


class Cluster:
    """A running cluster. Use it as ``async with await llumnix.connect() as cluster``, in one event loop.

    Orders that cannot be carried out are answered with a Refusal, which says why, and change nothing.
    ManagerAway is raised while the manager does not answer; generating goes on meanwhile.
    """

    def __init__(
        self, description: ClusterDescription, admin: RayAdmin, model: ModelInfo, tokenizer: TextTokenizer
    ) -> None:
        self.model = model
        self._admin = admin
        self._tokenizer = tokenizer
        self._frontend_id = f"connect-{uuid.uuid4().hex[:8]}"
        self._frontend = Frontend(
            on_this_host(description.config),
            frontend_id=self._frontend_id,
            manager_address=description.manager_address,
            on_failure=lambda error: self._frontend.stop(),
        )

    async def __aenter__(self) -> "Cluster":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what this handle still generates, and leave. The cluster runs on."""
        await self._frontend.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        priority: int = 0,
        tenant: str = "",
        adapter: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> AsyncIterator[Generated]:
        """Continue a text or a list of token ids, piece by piece. ``sampling`` takes the other fields of
        SamplingParams (temperature, top_p, seed, …), ``adapter`` one of ``model.adapters``. ``request_id``
        is this handle's name for the request, which another handle may use as well; it may be used again
        once its request has ended. Leaving the loop early stops the request. Raises
        ConfigurationError for settings out of range, StreamFailed if the cluster cannot take the request."""
        tokens = self._tokens(prompt)
        if not tokens or len(tokens) + max_tokens > self.model.max_model_len:
            limit = self.model.max_model_len
            raise ConfigurationError(
                f"a prompt of {len(tokens)} tokens and max_tokens {max_tokens}: the prompt may not be empty, "
                f"and both together have room for {limit} tokens"
            )
        sampling.setdefault("seed", secrets.randbelow(SEED_MAX))
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        if adapter and adapter not in self.model.adapters:
            raise ConfigurationError(f"there is no LoRA adapter {adapter!r}")
        if self.model.greedy_only and not params.greedy:
            raise ConfigurationError(GREEDY_ONLY)
        if not isinstance(request_id, str):
            raise ConfigurationError(f"a request_id is a str, not {request_id!r}")
        name = request_id or f"gen-{uuid.uuid4().hex}"
        full_id = id_of(request_id, self._frontend_id) if request_id else name
        if full_id in self._frontend.table:
            raise ConfigurationError(f"request {name!r} is being generated already")
        call = StreamCall(
            request_id=full_id,
            prompt_tokens=tokens,
            sampling=params,
            scheduling_priority=priority,
            execution_priority=priority,
            tenant=tenant,
            adapter=adapter,
            first_epoch=epoch_at(time.time_ns() // 1_000_000),
        )
        check_sendable(call)
        stream = self._frontend.open(call)
        text = TextStream(self._tokenizer.table)
        try:
            async for chunk in stream:
                ended = chunk.finish_reason is not None
                yield Generated(name, text.push(chunk.tokens, ended).text, chunk.tokens, chunk.finish_reason)
        finally:
            await stream.cancel()

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The prompt's tokens. Raises ConfigurationError for ids that the model does not have."""
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        tokens = tuple(index(token) for token in prompt)  # numpy's whole numbers are no ints
        most = max(self.model.vocab_size, self._tokenizer.vocab_size)
        if tokens and not 0 <= min(tokens) <= max(tokens) < most:
            raise ConfigurationError(f"prompt token ids must be within 0 and {most - 1}")
        return tokens

    async def status(self) -> ClusterSummary:
        """The cluster in one record."""
        return await self._admin.status()

    async def instances(self) -> tuple[InstanceRow, ...]:
        """Every instance, by id."""
        return await self._admin.instances()

    async def requests(self) -> tuple[RequestRow, ...]:
        """Every request of every instance. One that another handle chose the id of has that handle's name
        behind it; orders and questions may leave it out as long as only one request is called so."""
        rows = await self._admin.requests()
        return tuple(replace(row, request_id=name_at(row.request_id, self._frontend_id)) for row in rows)

    async def migrate(self, request_id: str, to: str) -> MigrationResult | Refusal:
        """Move a request to the instance ``to``; answered when the migration has ended."""
        return await self._admin.migrate(self._full_id(request_id), to)

    async def drain(self, instance_id: str) -> InstanceRow | Refusal:
        """Place nothing new on an instance and move away what it holds. Answered at once; watch
        ``instances``."""
        return await self._admin.drain(instance_id)

    async def resume(self, instance_id: str) -> InstanceRow | Refusal:
        """Let a draining instance serve again."""
        return await self._admin.resume(instance_id)

    async def set_role(self, instance_id: str, role: InstanceRole | str) -> InstanceRow | Refusal:
        """Let an instance work as "prefill", "decode" or "neutral"; what no longer suits it moves. Raises
        ValueError for another role."""
        return await self._admin.set_role(instance_id, InstanceRole(role))

    async def scale(self, instances: int) -> ClusterSummary | Refusal:
        """Have this many instances. Answered when they serve, or when the surplus ones are empty and
        stopped."""
        return await self._admin.scale(instances)

    async def policies(self) -> PolicyState:
        """The policies and scheduler settings in force."""
        return await self._admin.policies()

    async def set_policy(self, kind: str, name: str, **settings: str | int | float) -> PolicyState | Refusal:
        """Go by another policy of a kind (dispatch, pairing …: see ``policies``) or by other settings."""
        return await self._admin.set_policy(
            kind, name, {setting: str(value) for setting, value in settings.items()}
        )

    async def explain(self, request_id: str) -> tuple[DecisionRow, ...] | Refusal:
        """Where a request was placed and moved, and why, oldest first."""
        return await self._admin.explain(self._full_id(request_id))

    def _full_id(self, request_id: str) -> str:
        """A request that is generated here is meant before any other of its name."""
        full_id = id_of(request_id, self._frontend_id)
        return full_id if full_id in self._frontend.table else request_id

    async def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """What happened since the event numbered ``after``, oldest first."""
        return await self._admin.events(after, limit)


def check_sendable(call: StreamCall) -> None:
    """Raise ConfigurationError unless an instance would take these values from the wire. It drops a message
    with a wrong type, and whoever sent it would wait."""
    try:
        decode(encode(Submit(Stream(call, opened_at=0.0, epoch=call.first_epoch).spec("", 0.0))))
    except (ProtocolError, TypeError, ValueError, OverflowError) as error:
        raise ConfigurationError(f"this request cannot be sent: {error}") from error
