"""vLLM instances of two ranks, beside ones of a single rank and of our own engine: what a request says, moved
or not, with a LoRA adapter or without, guessed or not, is what a single rank says; nothing of an instance is
left when it has ended."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, cycle
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from local_cluster import LocalCluster, local_cluster, simulated_config
from lora_adapters import merge_adapter, write_adapter
from shared_memory import met_in, shared_by, sockets_of
from small_llama import ADAPTED, small_llama
from transformers import AutoModelForCausalLM

from llumnix.api.backend import StreamCall
from llumnix.core.admin import MigrationResult
from llumnix.core.config import Config, EngineConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.sampling import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

START_S = 240.0
NEW_TOKENS = 120
CROWDS_MAX = 6
Outputs = list[tuple[int, ...]]
Pairs = set[tuple[str, str]]
PROMPTS = [tuple(range(100 + 7 * n, 130 + 30 * n)) for n in range(8)]
NAMES = ("", "one", "two")
"""Adapters of a mixed crowd's requests, in turns."""
GUESSES = 3
SPECULATION = (
    'speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, '
    '"prompt_lookup_max": 4}'
)
DRAWN = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed, ADAPTED) for seed, name in enumerate(NAMES) if name}


def settings(
    model: str,
    degree: int,
    block_size: int = 32,
    kind: str = "vllm",
    adapters: dict[str, Path] | None = None,
    more: str = "",
) -> Config:
    config = simulated_config()
    lora = "" if adapters is None else ";max_loras=2"
    engine = EngineConfig(
        kind=kind,
        model=model,
        device="cpu",
        dtype="float32",
        kv_blocks=400,
        step_tokens_max=256,
        threads=degree,
        max_model_len=1024,
        tensor_parallel=degree,
        staging_gib=0.02,
        batch_max=4,
        lora_modules=";".join(f"{name}={folder}" for name, folder in (adapters or {}).items()),
        engine_args=f"enforce_eager=true;block_size={block_size}{lora}{more}" if kind == "vllm" else "",
    )
    return replace(
        config,
        engine=engine,
        migration=replace(config.migration, answer_timeout_s=5.0, reservation_s=15.0),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(model: str, adapters: dict[str, Path]) -> AsyncIterator[LocalCluster]:
    """One rank with adapters, in this process; two that have them too, and guess; two with other blocks and
    none of that. The tests run in order, the last of them kill."""
    configs = [
        settings(model, 1, adapters=adapters),
        settings(model, 2, adapters=adapters, more=f";{SPECULATION}"),
        settings(model, 2, block_size=64),
    ]
    async with local_cluster(configs[0], instances=()) as cluster:
        await asyncio.gather(
            cluster.add_instance("i0"),
            *(cluster.add_process(f"i{n}", configs[n], START_S) for n in (1, 2)),
        )
        await cluster.serving(len(configs))
        yield cluster


async def pieces(
    cluster: LocalCluster, name: str, prompt: Sequence[int], adapter: str = "", **sampling: Any
) -> list[tuple[int, ...]]:
    params = SamplingParams(**{"max_tokens": NEW_TOKENS, "ignore_eos": True, "seed": 5, **sampling})
    stream = cluster.frontend.open(StreamCall(name, tuple(prompt), params, adapter=adapter))
    return [chunk.tokens async for chunk in stream]


async def one(
    cluster: LocalCluster, name: str, prompt: Sequence[int], adapter: str = "", **sampling: Any
) -> tuple[int, ...]:
    return tuple(chain.from_iterable(await pieces(cluster, name, prompt, adapter, **sampling)))


async def crowd(cluster: LocalCluster, name: str, names: Sequence[str] = ("",), **sampling: Any) -> Outputs:
    """All prompts at once, with these adapters in turns."""
    turns = zip(count(), PROMPTS, cycle(names))
    said = (one(cluster, f"{name}{n}", prompt, adapter, seed=n, **sampling) for n, prompt, adapter in turns)
    return list(await asyncio.gather(*said))


def instances(cluster: LocalCluster) -> list[str]:
    """Those that serve, in order."""
    return [row.instance_id for row in cluster.manager.instances() if row.state == "serving"]


def drain(cluster: LocalCluster, instance_ids: Sequence[str], draining: bool) -> None:
    for instance_id in instance_ids:
        cluster.manager.set_draining(instance_id, draining)


async def all_of(cluster: LocalCluster, name: str, **asked: Any) -> tuple[Outputs, Pairs, int]:
    """A crowd, more than one instance runs, all to the first; then around among the instances.
    Those that wait go first, as only a few may leave at a time. Returns what they said, between which
    instances requests moved, and how many moved while they waited."""
    ids, moved, waited = instances(cluster), set[tuple[str, str]](), 0
    drain(cluster, ids[1:], True)
    outputs = asyncio.ensure_future(crowd(cluster, name, **asked))
    while not any(row.output_tokens for row in await cluster.manager.requests()):
        await asyncio.sleep(0.02)
    drain(cluster, ids[1:], False)
    while not outputs.done():
        rows = await cluster.manager.requests()
        rows = sorted((row for row in rows if row.instance_id in ids), key=lambda row: row.output_tokens)
        targets = {row.request_id: ids[(ids.index(row.instance_id) + 1) % len(ids)] for row in rows}
        results = await asyncio.gather(
            *(cluster.manager.migrate(row.request_id, targets[row.request_id]) for row in rows)
        )
        for row, result in zip(rows, results):
            if isinstance(result, MigrationResult) and result.outcome is MigrationOutcome.COMMITTED:
                moved.add((row.instance_id, targets[row.request_id]))
                waited += row.output_tokens == 0
        await asyncio.sleep(0.02)
    return await outputs, moved, waited


async def until_moved(
    cluster: LocalCluster, name: str, wanted: Pairs, expected: Callable[[Outputs], Outputs], **asked: Any
) -> int:
    """Crowds, each of which says what is expected, until requests have moved between all pairs that are
    wanted. How many moved while they waited."""
    moved, waited = set[tuple[str, str]](), 0
    for n in range(CROWDS_MAX):
        said, pairs, waiting = await all_of(cluster, f"{name}{n}-", **asked)
        assert said == expected(said)
        await cluster.idle()
        moved, waited = moved | pairs, waited + waiting
        if wanted <= moved and waited:
            break
    assert moved >= wanted
    return waited


async def unmoved(cluster: LocalCluster, **sampling: Any) -> Outputs:
    """What they say on the instance of one rank."""
    others = instances(cluster)[1:]
    drain(cluster, others, True)
    said = await crowd(cluster, "u", **sampling)
    drain(cluster, others, False)
    await cluster.idle()
    return said


def likeliest(
    model: str, outputs: Sequence[Sequence[int]], adapters: Sequence[Path | None] = (None,)
) -> Outputs:
    """What greedy decoding gives in each place of the outputs, by the reference implementation, with these
    adapters in turns."""
    references: list[Any] = []
    for folder in adapters:
        references.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
        if folder is not None:
            merge_adapter(references[-1], folder)
    found = []
    with torch.inference_mode():
        for prompt, output, reference in zip(PROMPTS, outputs, cycle(references)):
            scores = reference(torch.tensor([[*prompt, *output]])).logits[0]
            found.append(tuple(scores[len(prompt) - 1 : -1].argmax(dim=-1).tolist()))
    return found


def children(pid: int) -> set[int]:
    """Process ids directly below ``pid`` that run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] not in ("Z", "X"):
            found.add(int(stat.parent.name))
    return found


def unnamed(pids: set[int]) -> bool:
    """Whether these processes share memory, and are connected by sockets, that nobody finds any more, so that
    they are gone with them."""
    shared, sockets = shared_by(pids), sockets_of(pids)
    found = shared & set(os.listdir("/dev/shm")) or any(socket.exists() for socket in sockets)
    return {name.partition("_")[0] for name in shared} >= {"vllm", "psm"} and bool(sockets) and not found


def meeting_files(pids: set[int]) -> set[Path]:
    """In which these ranks met: there as long as they run."""
    files = met_in(shared_by(pids))
    assert files and all(file.exists() for file in files)
    return files


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pids: set[int]) -> None:
    async with asyncio.timeout(20):
        while any(runs(pid) for pid in pids):
            await asyncio.sleep(0.05)


async def test_requests_move_between_one_rank_and_two_and_different_blocks(
    cluster: LocalCluster, model: str
) -> None:
    wanted = {("i0", "i1"), ("i1", "i2"), ("i2", "i0")}
    waited = await until_moved(cluster, "g", wanted, partial(likeliest, model), temperature=0.0)
    assert waited, "some moved before they had begun"


async def test_two_ranks_guess_and_what_is_accepted_is_right(cluster: LocalCluster, model: str) -> None:
    drain(cluster, ["i0", "i2"], True)
    said = await asyncio.gather(
        *(pieces(cluster, f"p{n}", prompt, temperature=0.0) for n, prompt in enumerate(PROMPTS[:4]))
    )
    drain(cluster, ["i0", "i2"], False)
    outputs = [tuple(chain.from_iterable(one)) for one in said]
    assert outputs == likeliest(model, outputs)
    sizes = {len(piece) for one in said for piece in one}
    assert {1, 2} <= sizes <= set(range(GUESSES + 2)), "no guess was accepted, or all were"


async def test_adapters_move_between_one_rank_and_two(
    cluster: LocalCluster, model: str, adapters: dict[str, Path]
) -> None:
    """Rows with either and with none share batches on both, and one instance has none to offer them."""
    drain(cluster, ["i2"], True)
    folders = [adapters.get(name) for name in NAMES]
    expected = partial(likeliest, model, adapters=folders)
    wanted = {("i0", "i1"), ("i1", "i0")}
    assert await until_moved(cluster, "a", wanted, expected, names=NAMES, temperature=0.0)
    drain(cluster, ["i2"], False)
    rows = {row.instance_id: row.adapters for row in cluster.manager.instances()}
    assert rows == {"i0": NAMES[1:], "i1": NAMES[1:], "i2": ()}


async def test_sampled_requests_say_the_same_on_one_rank_and_on_the_move(cluster: LocalCluster) -> None:
    drain(cluster, ["i1"], True)  # where vLLM guesses it draws nothing alike
    undisturbed = await unmoved(cluster, **DRAWN)
    await until_moved(cluster, "s", {("i0", "i2"), ("i2", "i0")}, lambda said: undisturbed, **DRAWN)
    drain(cluster, ["i1"], False)


async def test_requests_move_between_two_ranks_and_our_own_engine(cluster: LocalCluster, model: str) -> None:
    drain(cluster, ["i0"], True)
    await cluster.add_instance("i3", settings(model, 1, kind="torch"))
    await cluster.serving(3)
    wanted = {("i1", "i2"), ("i2", "i3"), ("i3", "i1")}
    await until_moved(cluster, "t", wanted, partial(likeliest, model), temperature=0.0)
    drain(cluster, ["i0"], False)


async def test_an_instance_ends_with_a_rank_and_its_requests_go_on(
    cluster: LocalCluster, model: str, adapters: dict[str, Path]
) -> None:
    whole = cluster.processes["i1"]
    assert whole.pid is not None
    ranks = children(whole.pid)
    assert unnamed({whole.pid} | ranks)
    files = meeting_files(ranks)
    running = asyncio.ensure_future(crowd(cluster, "k", NAMES, temperature=0.0))
    while not any(
        row.instance_id == "i1" and row.output_tokens > 3 for row in await cluster.manager.requests()
    ):
        await asyncio.sleep(0.02)
    os.kill(max(ranks), signal.SIGKILL)
    await gone({whole.pid} | ranks)
    assert not any(file.exists() for file in files)
    cluster.kill("i1")
    said = await running
    assert said == likeliest(model, said, [adapters.get(name) for name in NAMES])
    await cluster.idle()


async def test_a_killed_instance_takes_its_ranks_along_and_leaves_no_memory(
    cluster: LocalCluster, model: str
) -> None:
    pid = cluster.processes["i2"].pid
    assert pid is not None
    ranks = children(pid)
    assert len(ranks) >= 2
    running = asyncio.ensure_future(crowd(cluster, "l", temperature=0.0))
    while not any(
        row.instance_id == "i2" and row.output_tokens > 3 for row in await cluster.manager.requests()
    ):
        await asyncio.sleep(0.02)
    assert unnamed({pid} | ranks)
    files = meeting_files(ranks)
    cluster.kill("i2")
    await gone(ranks)
    assert not any(file.exists() for file in files)
    said = await running
    assert said == likeliest(model, said)
    await cluster.idle()
