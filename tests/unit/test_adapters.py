"""LoRA adapters on their way through the cluster: who may get a request that needs one, who gets it first,
what is refused; from the settings to the target of a move."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from control_driving import ToyCluster
from engine_driving import refusal_code, small_engine, spec
from migration_driving import agent, messages, reserve
from policy_views import running, view

from llumnix.api.backend import ModelInfo
from llumnix.api.byte_tokenizer import ByteTokenizer
from llumnix.api.errors import ApiError
from llumnix.api.intake import Intake
from llumnix.api.openai_schema import ChatBody, CompletionBody
from llumnix.core.admin import DecisionRow, Refusal
from llumnix.core.config import EngineConfig, FrontendConfig, SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import InstanceRole, NotPlaced, Placed
from llumnix.core.messages.migration import RefusalCode, Refused
from llumnix.core.messages.serving import RejectCode
from llumnix.core.sampling import GREEDY_ONLY
from llumnix.core.views import ClusterSnapshot
from llumnix.instance.request import Request
from llumnix.instance.vllm_adapters import read_adapters, room_for
from llumnix.policies.pairing import FreenessPairing

BOTH = ("law", "sql")


def cluster_of(config: SchedulerConfig | None = None, **known: tuple[str, ...]) -> ToyCluster:
    cluster = ToyCluster(config or SchedulerConfig(pairing_policy="none"))
    for instance_id, adapters in known.items():
        cluster.add(instance_id, adapters=adapters)
    return cluster


def where(cluster: ToyCluster, request_id: str, adapter: str) -> str:
    answer = cluster.place(request_id, adapter=adapter)
    assert isinstance(answer, Placed), answer
    return answer.instance_id


def why(cluster: ToyCluster, request_id: str) -> DecisionRow:
    rows = cluster.core.explain(request_id, cluster.now)
    assert not isinstance(rows, Refusal)
    return rows[-1]


class TestDispatch:
    def test_only_instances_that_know_the_adapter_get_its_requests(self) -> None:
        cluster = cluster_of(a=(), b=BOTH, c=())
        assert {where(cluster, f"r{number}", "sql") for number in range(6)} == {"b"}
        assert {where(cluster, f"p{number}", "") for number in range(6)} != {"b"}

    def test_an_instance_that_has_it_loaded_comes_before_a_freer_one(self) -> None:
        cluster = cluster_of(a=BOTH, b=BOTH)
        cluster.instances["b"].loaded = ("sql",)
        cluster.instances["b"].running = {"old": 10}
        cluster.report()
        assert where(cluster, "r", "sql") == "b"
        assert where(cluster, "l", "law") == "a"
        assert "1 of 2 have adapter sql at hand" in why(cluster, "r").reason
        assert why(cluster, "r").candidates == 2
        assert "law is to be loaded" in why(cluster, "l").reason

    def test_but_not_when_it_is_much_busier(self) -> None:
        cluster = cluster_of(a=BOTH, b=BOTH)
        cluster.instances["b"].loaded = ("sql",)
        cluster.instances["b"].running = {f"old{number}": 15 for number in range(6)}
        cluster.report()
        assert where(cluster, "r", "sql") == "a"

    def test_the_share_is_a_setting(self) -> None:
        ties_only = SchedulerConfig(pairing_policy="none", adapter_share=0.0)
        cluster = cluster_of(ties_only, a=BOTH, b=BOTH)
        cluster.instances["b"].loaded = ("sql",)
        cluster.report()
        assert where(cluster, "tie", "sql") == "b"
        cluster.instances["b"].running = {"old": 10}
        cluster.report()
        assert where(cluster, "r", "sql") == "a"
        with pytest.raises(ConfigurationError, match="adapter_share"):
            SchedulerConfig(adapter_share=1.5)

    def test_a_placement_no_report_has_confirmed_counts_as_loaded(self) -> None:
        cluster = cluster_of(a=BOTH, b=BOTH, c=BOTH)
        assert where(cluster, "plain", "") == "a"
        assert where(cluster, "r1", "sql") == "b"
        assert where(cluster, "r2", "sql") == "b"

    def test_every_policy_chooses_among_those_that_have_it(self) -> None:
        for policy in ("round-robin", "load", "least-requests", "power-of-two"):
            config = SchedulerConfig(pairing_policy="none", dispatch_policy=policy)
            cluster = cluster_of(config, a=BOTH, b=BOTH, c=BOTH)
            cluster.instances["c"].loaded = ("sql",)
            cluster.report()
            assert where(cluster, "r", "sql") == "c", policy

    def test_an_adapter_nobody_has_is_refused_for_good(self) -> None:
        answer = cluster_of(a=BOTH).place("r", adapter="tax")
        assert isinstance(answer, NotPlaced)
        assert (answer.reason, answer.retry_after_s) == ("no serving instance has the LoRA adapter tax", 0.0)

    def test_an_adapter_whose_instance_is_away_may_be_tried_again(self) -> None:
        cluster = cluster_of(a=(), b=BOTH)
        cluster.core.instance_ended("b", "a", cluster.now)
        answer = cluster.place("r", adapter="sql")
        assert isinstance(answer, NotPlaced) and answer.retry_after_s > 0


class TestMoves:
    def test_pairing_passes_over_an_instance_without_the_adapter(self) -> None:
        adapted = tuple(one._replace(adapter="sql") for one in running("a", 24, 24, 24, 24).candidates)
        full = running("a", 24, 24, 24, 24)._replace(candidates=adapted)
        pair = FreenessPairing(SchedulerConfig()).pair
        nobody = ClusterSnapshot(0.0, (full, view("b"), view("c")), frozenset())
        assert pair(nobody) == ()
        able = view("c", running=1, used_blocks=30)._replace(adapters=BOTH)
        moves = pair(ClusterSnapshot(0.0, (full, view("b"), able), frozenset()))
        assert {move.target_id for move in moves} == {"c"}

    def test_an_order_to_the_wrong_instance_is_refused_with_the_reason(self) -> None:
        cluster = cluster_of(a=BOTH, b=())
        cluster.instances["a"].running = {"r": 10}
        cluster.instances["a"].adapters = {"r": "sql"}
        cluster.report()
        query_id, effects = cluster.core.ask_migrate("r", "b", cluster.now)
        cluster.do(effects)
        answer = cluster.answers[query_id]
        assert isinstance(answer, Refusal)
        assert answer.reason == "r cannot move: b does not have the LoRA adapter sql"

    def test_after_its_prefill_a_request_goes_where_its_adapter_is(self) -> None:
        cluster = cluster_of()
        cluster.add("p", role=InstanceRole.PREFILL, adapters=BOTH)
        cluster.add("d", role=InstanceRole.DECODE)
        cluster.add("e", capacity=60, role=InstanceRole.DECODE, adapters=BOTH)
        cluster.instances["p"].running = {"r": 10}
        cluster.instances["p"].adapters = {"r": "sql"}
        cluster.report()
        assert [order.target_id for order in cluster.wants("p", "r")] == ["e"]

    def test_a_target_without_the_adapter_refuses(self) -> None:
        made = agent("target", small_engine())
        refusals = [
            one
            for one in messages(made.handle(reserve(replace(spec("r"), adapter="sql"), 2), 1.0))
            if isinstance(one, Refused)
        ]
        assert [(one.code, one.reason) for one in refusals] == [
            (RefusalCode.ADAPTER, "the LoRA adapter sql is not here")
        ]


def test_an_engine_without_the_adapter_sends_the_request_elsewhere() -> None:
    engine = small_engine()
    asked = replace(spec("r"), adapter="sql")
    assert refusal_code(engine.submit(asked, 0.0)) is RejectCode.NO_ADAPTER
    assert not engine.holds("r")


def test_a_request_carries_its_adapter() -> None:
    asked = replace(spec("r"), adapter="sql")
    assert Request.from_spec(asked, 1.0).to_spec(1.0) == asked
    assert Request.from_spec(asked, 1.0).row("i", 1.0).adapter == "sql"


class TestApi:
    INTAKE = Intake(ModelInfo("base", 100, "", (256,), 257, adapters=BOTH), ByteTokenizer(), FrontendConfig())

    def test_a_model_that_names_an_adapter_is_that_adapter(self) -> None:
        for model, adapter in ((None, ""), ("base", ""), ("sql", "sql")):
            chat = ChatBody(model=model, messages=[{"role": "user", "content": "hi"}])
            [choice] = asyncio.run(self.INTAKE.chat("id", chat))
            assert choice.call.adapter == adapter
            [choice] = asyncio.run(self.INTAKE.completion("id", CompletionBody(model=model, prompt="hi")))
            assert choice.call.adapter == adapter

    def test_an_unknown_one_is_404(self) -> None:
        with pytest.raises(ApiError) as caught:
            asyncio.run(self.INTAKE.completion("id", CompletionBody(model="tax", prompt="hi")))
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")

    def test_with_speculative_decoding_only_greedy_requests_are_taken(self) -> None:
        model = ModelInfo("base", 100, "", (256,), 257, greedy_only=True)
        intake = Intake(model, ByteTokenizer(), FrontendConfig())
        asyncio.run(intake.completion("id", CompletionBody(prompt="hi", temperature=0)))
        for other in ({}, {"temperature": 0, "presence_penalty": 0.5}):
            with pytest.raises(ApiError, match="speculative") as caught:
                asyncio.run(intake.completion("id", CompletionBody(prompt="hi", **other)))
            assert (caught.value.status, caught.value.message) == (400, GREEDY_ONLY)


class TestSettings:
    def folder(self, path: Path, **changes: object) -> Path:
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"r": 12} | changes))
        (path / "adapter_model.safetensors").write_bytes(b"")
        return path

    def test_adapters_are_numbered_and_measured(self, tmp_path: Path) -> None:
        sql, law = self.folder(tmp_path / "sql"), self.folder(tmp_path / "law", rank_pattern={"q": 40})
        adapters = read_adapters(EngineConfig(kind="vllm", lora_modules=f"sql={sql}; law={law}"))
        assert [(one.name, one.number, one.rank) for one in adapters] == [("sql", 1, 12), ("law", 2, 40)]
        assert room_for(adapters) == 64 and room_for(adapters[:1]) == 16

    @pytest.mark.parametrize("text", ["sql", "=x", "sql=", "sql=/x;sql=/y"])
    def test_settings_that_make_no_sense(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="lora_modules"):
            EngineConfig(kind="vllm", lora_modules=text)

    def test_folders_that_hold_no_adapter(self, tmp_path: Path) -> None:
        def refused(path: Path) -> str:
            with pytest.raises(ConfigurationError) as caught:
                read_adapters(EngineConfig(kind="vllm", lora_modules=f"sql={path}"))
            return str(caught.value)

        assert "has no adapter_config.json" in refused(tmp_path)
        assert "r in adapter_config.json must be" in refused(self.folder(tmp_path / "a", r=0))
        bare = self.folder(tmp_path / "b")
        (bare / "adapter_model.safetensors").unlink()
        assert "has none of adapter_model.safetensors" in refused(bare)

    def test_only_vllm_has_them(self) -> None:
        with pytest.raises(ConfigurationError, match="lora_modules need engine vllm"):
            EngineConfig(kind="torch", lora_modules="sql=/x")
