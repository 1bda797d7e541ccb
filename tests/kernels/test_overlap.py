"""Kernels launched before the one ahead of them has ended compute what they would after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pie_async.cuda.kernels import overlap
from pie_async.cuda.kernels.activation import activate
from pie_async.cuda.kernels.decode_attention import (
    DecodeWorkspace,
    decode_attention,
    plan_decode,
)
from pie_async.cuda.kernels.linear import Choice, linear
from pie_async.cuda.kernels.norm import add_norm, norm
from pie_async.cuda.kernels.qkv import rotate_and_store

KERNELS = sorted(Path(overlap.__file__).parent.glob("*.py"))


def overlapping_kernels() -> Iterator[ast.FunctionDef]:
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names = {argument.arg for argument in node.args.args}
                if "overlaps" in names:
                    yield node


@pytest.mark.parametrize("kernel", list(overlapping_kernels()), ids=lambda kernel: kernel.name)
def test_every_program_waits_before_it_writes_or_ends(kernel) -> None:
    """At the top level of its body, so on every way through it."""
    statements = [ast.unparse(statement) for statement in kernel.body]
    waits = [statement.startswith("await_earlier(overlaps") for statement in statements]
    assert True in waits
    for statement in statements[: waits.index(True)]:
        assert not any(word in statement for word in ("tl.store", "tl.atomic", "return", "for "))


def test_nothing_overlaps_where_kernels_are_interpreted() -> None:
    assert overlap.overlap(torch.device("cpu")) == {"overlaps": False}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "choice"),
    [
        (1, ("rows", 8, 512, 4, 3)),
        (1, ("rows", 4, 1024, 4, 1)),
        (9, ("split", 16, 64, 128, 4, 4, 2)),
    ],
    ids=str,
)
def test_replays_give_the_bits_of_kernels_that_run_one_by_one(rows, choice, monkeypatch) -> None:
    device = torch.device("cuda")
    if not overlap.can_overlap(device):
        pytest.skip("this GPU launches kernels one by one")
    with torch.cuda.stream(torch.cuda.Stream()):
        layers = Layers(rows, choice, device)
        overlapped = layers.captured()
        monkeypatch.setattr(overlap, "can_overlap", lambda device: False)
        one_by_one = layers.captured()
        for _ in range(50):
            given, kv = torch.randn_like(layers.given), torch.randn_like(layers.kv)
            expected = layers.replayed(one_by_one, given, kv)
            found = layers.replayed(overlapped, given, kv)
            assert all(map(torch.equal, found, expected))


class Layers:
    """Some layers of a decoder for rows of one token each, over one layer's KV."""

    NUM, HEADS, KV_HEADS, DIM, INNER, CONTEXT = 4, 16, 4, 128, 4096, 200

    def __init__(self, rows: int, choice: Choice, device: torch.device) -> None:
        self._rows, self._choice = rows, choice
        hidden, total = self.HEADS * self.DIM, (self.HEADS + 2 * self.KV_HEADS) * self.DIM
        shapes = ((total, hidden), (hidden, hidden), (2 * self.INNER, hidden), (hidden, self.INNER))
        how = {"dtype": torch.bfloat16, "device": device}
        self._weights = [
            [torch.randn(*shape, **how) * shape[1] ** -0.5 for shape in shapes]
            for _ in range(self.NUM)
        ]
        self._factors = torch.rand(hidden, **how)
        blocks = self.CONTEXT // 16 + 1
        numbers = {"dtype": torch.int32, "device": device}
        self.given = torch.empty(rows, hidden, **how)
        self.kv = torch.empty(rows * blocks, 2, self.KV_HEADS, 16, self.DIM, **how)
        self._tables = torch.arange(rows * blocks, **numbers).view(rows, blocks)
        self._lanes = torch.arange(rows, **numbers)
        self._positions = torch.full((rows,), self.CONTEXT, **numbers)
        self._places = self._tables[:, -1].long() * 16 + self.CONTEXT % 16
        self._workspace = DecodeWorkspace(
            max_rows=rows,
            heads=self.HEADS,
            kv_heads=self.KV_HEADS,
            head_dim=self.DIM,
            block_tokens=16,
            dtype=torch.bfloat16,
            device=device,
        )

    def captured(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._run()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = self._run()
        graph.capture_end()
        return graph, out

    def replayed(self, captured, given: torch.Tensor, kv: torch.Tensor) -> list[torch.Tensor]:
        graph, out = captured
        self.given.copy_(given)
        self.kv.copy_(kv)
        graph.replay()
        return [out.clone(), self.kv.clone()]

    def _run(self) -> torch.Tensor:
        plan = plan_decode(self._positions, self._lanes, window=None, workspace=self._workspace)
        residual = self.given.clone()
        x = norm(residual, self._factors, None, eps=1e-5, is_rms=True)
        for qkv, out, up, down in self._weights:
            queries = rotate_and_store(
                linear(x, qkv, choice=self._choice),
                self._places,
                self.kv,
                num_heads=self.HEADS,
                rotation=None,
                q_norm=None,
                k_norm=None,
                eps=1e-5,
            )
            attended = torch.empty_like(residual)
            decode_attention(
                queries,
                self.kv,
                self._tables,
                self._lanes,
                self._positions,
                window=None,
                plan=plan,
                out=attended,
                workspace=self._workspace,
            )
            x = self._normed(linear(attended, out, choice=self._choice), residual)
            inner = activate(linear(x, up, choice=self._choice), "silu", True)
            x = self._normed(linear(inner, down, choice=self._choice), residual)
        return x

    def _normed(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return add_norm(x, residual, self._factors, None, eps=1e-5, is_rms=True)
