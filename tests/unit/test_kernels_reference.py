"""The torch reference against textbook results that need no kernel, and the dispatch that picks
implementations."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from llumnix.kernels import ops
from llumnix.kernels.cpu import compiled
from llumnix.kernels.reference import ReferenceKernels


def test_paged_attention_equals_torchs_on_the_same_keys() -> None:
    kernels = ReferenceKernels()
    tokens, kv_heads, block_size, head_dim = 11, 2, 4, 8
    keys, values = torch.randn(2, tokens, kv_heads, head_dim)
    query = torch.randn(tokens, 4, head_dim)
    pool = torch.full((5, 1, 2, kv_heads, block_size, head_dim), float("nan"))
    table = torch.tensor([4, 0, 2], dtype=torch.int32)
    slots = torch.tensor(
        [int(table[at // block_size]) * block_size + at % block_size for at in range(tokens)]
    )
    kernels.write_kv(pool, 0, keys, values, slots)
    expected = functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    scale = head_dim**-0.5
    torch.testing.assert_close(kernels.prefill_attention(query, pool, 0, table, 0, scale), expected)
    last = kernels.decode_attention(
        query[-1:], pool, 0, table[None], torch.tensor([tokens], dtype=torch.int32), scale
    )
    torch.testing.assert_close(last[0], expected[-1])


def test_rope_keeps_lengths_and_depends_on_distance_only() -> None:
    kernels = ReferenceKernels()
    angles = torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    first, second = torch.randn(2, 1, 1, 8)
    products = []
    for shift in (0, 40):
        query, key = first.clone(), second.clone()
        kernels.rope(query, key.clone(), angles.cos(), angles.sin(), torch.tensor([7 + shift]))
        kernels.rope(key, key.clone(), angles.cos(), angles.sin(), torch.tensor([3 + shift]))
        torch.testing.assert_close(query.norm(), first.norm())
        products.append((query * key).sum())
    torch.testing.assert_close(products[0], products[1], atol=1e-5, rtol=1e-5)


def test_without_a_compiler_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(ops, "load_library", compiled.load_library.__wrapped__)
    with caplog.at_level("WARNING"):
        assert isinstance(ops.best_kernels("cpu"), ReferenceKernels)
    assert "no C compiler" in caplog.text


def test_two_that_build_at_once_do_not_spoil_one_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "kernels.so"
    built: list[bool] = []

    def compile_slowly(command: list[str], **_: object) -> SimpleNamespace:
        output = Path(command[-1])
        output.write_text("half")
        if not built:
            built.append(False)
            built.append(compiled._build("cc", library))  # another thread, or another machine's process 7
        assert output.read_text() == "half"
        output.write_text("whole")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(compiled.subprocess, "run", compile_slowly)
    assert compiled._build("cc", library) and built == [False, True]
    assert library.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [library]
