"""Stands in for the package `flashinfer`: its paged prefill wrapper, computed by the reference."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pie_async.cuda.kernels.attention_reference import prefill_attention_reference

if TYPE_CHECKING:
    import pytest

Plan = dict[str, Any]


class StandIn:
    """The package, and what was asked of it.

    Attributes:
        plans: arguments of every plan, in order.
        runs: which plan each run was of.
        fails: "plan" or "run": that raises; "result": it is wrong.
    """

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.runs: list[int] = []
        self.fails = ""

    def install(self, monkeypatch: pytest.MonkeyPatch, version: str = "9.9") -> None:
        """Make it what `import flashinfer` finds."""
        module = types.ModuleType("flashinfer")
        module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
        module.__version__ = version
        module.BatchPrefillWithPagedKVCacheWrapper = self._wrapper
        monkeypatch.setitem(sys.modules, "flashinfer", module)

    def _wrapper(self, workspace: Tensor, *, kv_layout: str, backend: str) -> _Wrapper:
        assert (kv_layout, backend, workspace.dtype) == ("HND", "fa3", torch.uint8)
        return _Wrapper(self)


class _Wrapper:
    def __init__(self, owner: StandIn) -> None:
        self._owner = owner
        self._plan: Plan = {}

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        if self._owner.fails == "plan":
            raise RuntimeError("no room for the plan\nand much more of it")
        self._plan = {
            "wrapper": self,
            "tokens": qo_indptr.tolist(),
            "blocks": paged_kv_indptr.tolist(),
            "slots": paged_kv_indices,
            "in_last_block": paged_kv_last_page_len.tolist(),
            "shape": (num_qo_heads, num_kv_heads, head_dim, page_size),
            "options": options,
        }
        self._owner.plans.append(self._plan)

    def run(self, queries: Tensor, kv: Tensor, *, out: Tensor, enable_pdl: bool) -> Tensor:
        if self._owner.fails == "run":
            raise RuntimeError("no kernel image is available")
        plan = self._plan
        heads, kv_heads, dim, size = plan["shape"]
        assert kv.shape[1:] == (2, kv_heads, size, dim) and kv[0].is_contiguous()
        assert not enable_pdl
        assert queries.shape == out.shape == (plan["tokens"][-1], heads, dim)
        tokens, blocks = plan["tokens"], plan["blocks"]
        for i, in_last in enumerate(plan["in_last_block"]):
            slots = plan["slots"][blocks[i] : blocks[i + 1]]
            count = tokens[i + 1] - tokens[i]
            end = (len(slots) - 1) * size + in_last
            found = prefill_attention_reference(
                queries[tokens[i] : tokens[i + 1]].double(),
                kv.double(),
                slots[None],
                [(0, 0, count, end - count)],
                window=None,
            )
            out[tokens[i] : tokens[i + 1]] = found.view(count, heads, dim).to(out.dtype)
        if self._owner.fails == "result":
            out[-1] += 1
        self._owner.runs.append(self._owner.plans.index(plan))
        return out
