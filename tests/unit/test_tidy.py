"""The rules of the house, checked on the source itself: what may import what, where time and chance may be
read, how long files and functions are. An exception is named here, with its reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "llumnix.instance": ROOT / "instance",
    "llumnix.migration": ROOT / "migration",
    "llumnix.policies": ROOT / "policies",
    "llumnix.kernels": ROOT / "kernels",
    "llumnix": ROOT / "llumnix",
}
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

ANY = (
    *("core", "kernels", "policies", "migration", "instance"),
    *("control", "api", "observe", "sim", "runtime", "bench", "cli"),
)
MAY_IMPORT = {
    "core": (),
    "kernels": (),
    "policies": ("core",),
    "migration": ("core", "kernels"),
    "instance": ("core", "kernels", "policies", "migration"),
    "control": ("core", "policies"),
    "observe": ("core",),
    "api": ("core", "observe"),
    "sim": ("core", "policies", "migration", "instance", "control", "api", "observe"),
    "runtime": ANY,
    "bench": ANY,
    "cli": ("core", "runtime", "bench", "sim"),
}
"""Which of our packages a package may import, beside itself."""

LIBRARY_HOMES = {
    "ray": r"runtime/|bench/",
    "zmq": r"runtime/bus\.py|migration/transports/zmq_",
    "torch": r"kernels/|instance/(models/|\w*executor\.py|sampler\w*\.py|kv_pool\.py|smollm2\.py"
    r"|swap_calibration\.py|vllm_\w+\.py)|migration/transports/|bench/",
    "triton": r"kernels/",
    "vllm": r"instance/vllm_|bench/(plain_vllm|vllm_client)\.py",
    "fastapi": r"api/",
    "click": r"cli/|bench/",
}
"""Where a library may be imported, as a pattern for paths inside our packages."""

PURE = (
    r"core/|policies/|control/|api/streams\.py|api/stream_state\.py|api/directory\.py|api/alarms\.py"
    r"|migration/(source|target|events|engine_sides)\.py|instance/(agent\w*|engine_core|local_scheduler"
    r"|block_manager|block_groups|free_runs|request|swap|swap_order|swap_ledger|switching|host_cache|batch"
    r"|ranking|priority_trace|step_times|waiting_queue|request_table|tenant_counters|copy_ladder|simulated_executor)\.py"
)
IMPURE_MODULES = {"time", "random", "uuid", "secrets", "socket", "threading", "asyncio", "datetime", "os"}
IMPURE_ALLOWED = {
    "core/config_source.py": "reads the user's settings file",
    "policies/registry.py": "imports plug-ins by name",
}
BROAD_EXCEPT_ALLOWED = {
    "policies/guard.py": "other people's policies: their faults are told, and the default decides",
    "runtime/launch.py": "Ray raises a bare Exception when its node does not come up",
    "instance/vllm_launch.py": "vLLM raises a bare Exception when the process of a rank does not come up",
    "runtime/instance_server.py": "the supervisor: logs, and fails the whole instance",
}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """(path inside our packages, file, syntax tree) of every module."""
    seen = set()
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            real = file.resolve()
            if real in seen:
                continue
            seen.add(real)
            inside = file.relative_to(folder)
            prefix = "" if package == "llumnix" else package.removeprefix("llumnix.") + "/"
            yield f"{prefix}{inside}", file, ast.parse(file.read_text(encoding="utf-8"))


SOURCES = list(sources())


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module name imported, at any depth; those only for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            if node.module == "llumnix":
                yield from (f"llumnix.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 60


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = []
    for path, _, tree in SOURCES:
        package = path.split("/")[0]
        if package not in MAY_IMPORT:
            continue
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] != "llumnix" or len(parts) < 2 or parts[1].startswith("_"):
                continue
            if parts[1] != package and parts[1] not in MAY_IMPORT[package]:
                wrong.append(f"{path} imports {name}")
    assert not wrong


@pytest.mark.parametrize("library", sorted(LIBRARY_HOMES))
def test_libraries_stay_where_they_belong(library: str) -> None:
    home = re.compile(LIBRARY_HOMES[library])
    wrong = [
        f"{path} imports {name}"
        for path, _, tree in SOURCES
        for name in imports(tree)
        if name.split(".")[0] == library and not home.match(path)
    ]
    assert not wrong


def test_pure_code_reads_no_clock_and_no_chance() -> None:
    pure = re.compile(PURE)
    wrong = [
        f"{path} imports {name}"
        for path, _, tree in SOURCES
        if pure.match(path) and path not in IMPURE_ALLOWED
        for name in imports(tree)
        if name.split(".")[0] in IMPURE_MODULES
    ]
    assert not wrong


def test_nothing_is_unpickled_and_nothing_broad_is_caught() -> None:
    wrong = []
    for path, _, tree in SOURCES:
        wrong += [
            f"{path} imports {name}" for name in imports(tree) if name in ("pickle", "cloudpickle", "marshal")
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler) or path in BROAD_EXCEPT_ALLOWED:
                continue
            if node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            ):
                wrong.append(f"{path}:{node.lineno} catches everything")
    assert not wrong


def test_files_and_functions_are_short() -> None:
    wrong = []
    for path, file, tree in SOURCES:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES_MAX and path not in LONG_FILES:
            wrong.append(f"{path} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                size = node.end_lineno - node.lineno + 1
                if size > FUNCTION_LINES_MAX and f"{path}:{node.name}" not in LONG_FUNCTIONS:
                    wrong.append(f"{path}:{node.name} has {size} lines")
    assert not wrong


def test_every_module_says_why_it_exists() -> None:
    assert not [path for path, _, tree in SOURCES if not ast.get_docstring(tree)]


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path, file, _ in SOURCES if file.stem in names]


def test_no_method_of_an_actor_is_a_coroutine() -> None:
    """Ray would run all of its methods on one thread: an order that waits would hold up every other."""
    actors = [
        (path, node)
        for path, _, tree in SOURCES
        if path.startswith("runtime/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Actor")
    ]
    assert len(actors) >= 2
    assert not [
        f"{path}:{actor.name}.{node.name}"
        for path, actor in actors
        for node in actor.body
        if isinstance(node, ast.AsyncFunctionDef)
    ]


def test_only_the_manager_is_called_manager() -> None:
    allowed = {"ManagerServer", "ManagerActor", "ManagerAway", "BlockManager"}
    found = {
        f"{path}:{node.name}"
        for path, _, tree in SOURCES
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "Manager" in node.name and node.name not in allowed
    }
    assert not found, "BlockManager is the field's term; no other class manages"


def test_the_engine_and_a_local_migration_need_no_ray() -> None:
    """A machine that has torch but neither Ray nor ZeroMQ runs the engine, the kernels and in-process
    moves."""
    starts = ["instance/in_process_engine.py", "instance/agent.py", "migration/transports/inprocess.py"]
    trees = {path: tree for path, _, tree in SOURCES}
    todo, seen = list(starts), set(starts)
    while todo:
        for name in imports(trees[todo.pop()]):
            assert name.split(".")[0] not in ("ray", "zmq"), name
            path = "/".join(name.split(".")[1:]) + ".py"
            if name.startswith("llumnix.") and path in trees and path not in seen:
                seen.add(path)
                todo.append(path)
    assert len(seen) > 15
