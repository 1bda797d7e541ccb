"""What an iteration and a copy cost on named hardware, and what pooling can gain there.

A roofline with corrections that were measured on an H200 with everything resident: the shares of
the memory's rate and of the matrix peak that kernels reach, a fixed cost per layer, and what
staging costs the layers beside it. Errors against what was measured: docs/simulation.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from pie_async.config import GIB
from pie_async.errors import ConfigError

OVERLAP = 3
"""Exponent of the norm that adds up what partly hides each other; without end: the longer one."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as seen by a roofline."""

    name: str
    memory_bytes: int
    hbm_bytes_per_s: float
    """What a large copy reaches, read plus write; below the data sheet."""
    flops_per_s: Mapping[int, float]
    """Dense matrix peak by bytes per weight: 1, 2 and 4 (TF32)."""
    efficiency: float = 0.91
    """Share of the memory's rate at which products of few rows read the weights."""
    attention_efficiency: float = 0.8
    """Share of it at which attention reads KV, and whatever works element by element."""
    product_efficiency: float = 0.72
    """Share of the matrix peak that products of many rows reach."""
    prefill_attention_efficiency: float = 0.355
    """The same of attention among many tokens."""
    layer_overhead_s: float = 6e-6
    """Per layer: kernel boundaries and a graph launch."""
    iteration_overhead_s: float = 50e-6
    """Per iteration: embedding, sampling, tokens to the host."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """The way between the host pool and the device, one direction."""

    name: str
    bytes_per_s: float
    latency_s: float
    """Fixed cost of one copy command."""
    run_s: float
    """Cost of every contiguous run in a copy; what makes small blocks slow."""
    staging_traffic: float = 2.0
    """Memory traffic of the GPU that a staged byte costs compute beside it, in bytes: its write,
    and what writes that trickle in from the link cost beyond that."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's sizes, as far as time depends on them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_gated: bool = True
    """Three MLP matrices (Llama, Qwen) rather than two (OPT)."""
    weight_item_bytes: int = 2
    kv_item_bytes: int = 2

    @property
    def layer_parameters(self) -> int:
        """Matrix parameters of one layer."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.kv_heads)
        mlp = (3 if self.is_gated else 2) * self.hidden_size * self.intermediate_size
        return attention + mlp

    @property
    def head_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def token_layer_activation_bytes(self) -> int:
        """What one layer's kernels other than products and attention read and write of a token:
        norms, rotation, activation, residuals."""
        wide = (3 if self.is_gated else 2) * self.intermediate_size
        return 2 * (10 * self.hidden_size + wide)

    @property
    def weight_bytes(self) -> int:
        """Weights read by a decode iteration: all layers and the output head."""
        parameters = self.num_layers * self.layer_parameters + self.head_parameters
        return parameters * self.weight_item_bytes

    @property
    def token_layer_kv_bytes(self) -> int:
        """KV of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_item_bytes


class Work(msgspec.Struct, frozen=True, gc=False):
    """What an iteration has to do, summed over its rows."""

    fed_tokens: int
    read_tokens: int
    """Tokens whose KV attention reads: every row's context."""
    attended_tokens: float
    """Query-key pairs: for every fed token, the tokens it attends to."""
    sampled_rows: int

    @classmethod
    def decode(cls, batch: int, context: int) -> Work:
        """`batch` sequences with `context` tokens each, one new token for each."""
        return cls(batch, batch * context, batch * context, batch)


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds for what a device does with one model."""

    gpu: Gpu
    link: Link
    shape: ModelShape

    def layer_s(self, work: Work, staged_bytes: int = 0) -> float:
        """One layer of an iteration, while `staged_bytes` of KV are copied in for one."""
        gpu, shape = self.gpu, self.shape
        rate = gpu.attention_efficiency * gpu.hbm_bytes_per_s
        flops_per_s = gpu.prefill_attention_efficiency * gpu.flops_per_s[shape.weight_item_bytes]
        matrices_s = self._matrix_s(shape.layer_parameters, work.fed_tokens)
        attention_s = max(
            work.read_tokens * shape.token_layer_kv_bytes / rate,
            4 * work.attended_tokens * shape.num_heads * shape.head_dim / flops_per_s,
        )
        others_s = work.fed_tokens * shape.token_layer_activation_bytes / rate
        staging_s = self.staging_s(staged_bytes)
        return matrices_s + attention_s + others_s + staging_s + gpu.layer_overhead_s

    def staging_s(self, num_bytes: int) -> float:
        """By how much compute takes longer while so many bytes are staged."""
        return self.link.staging_traffic * num_bytes / self.gpu.hbm_bytes_per_s

    def head_s(self, work: Work) -> float:
        """The output head, sampling, and everything else that an iteration has once."""
        head_s = self._matrix_s(self.shape.head_parameters, work.sampled_rows)
        return head_s + self.gpu.iteration_overhead_s

    def iteration_s(self, work: Work, staged_bytes: int = 0) -> float:
        """A whole iteration that never waits; `staged_bytes` over all layers."""
        layers = self.shape.num_layers
        return layers * self.layer_s(work, staged_bytes // layers) + self.head_s(work)

    def copy_s(self, num_bytes: int, num_runs: int) -> float:
        """One copy command of this many contiguous runs, either direction."""
        link = self.link
        return link.latency_s + num_runs * link.run_s + num_bytes / link.bytes_per_s

    def roofline_s(self, work: Work) -> float:
        """What the hardware would need at best: no overheads, everything overlapped."""
        kv_bytes = work.read_tokens * self.shape.token_layer_kv_bytes * self.shape.num_layers
        return (self.shape.weight_bytes + kv_bytes) / self.gpu.hbm_bytes_per_s

    def _matrix_s(self, parameters: int, tokens: int) -> float:
        """A matrix product of `tokens` rows: reading the weights, or multiplying them. Where both
        take as long, neither hides the other quite."""
        if not tokens:
            return 0.0
        gpu, item_bytes = self.gpu, self.shape.weight_item_bytes
        reading_s = parameters * item_bytes / (gpu.efficiency * gpu.hbm_bytes_per_s)
        peak = gpu.product_efficiency * gpu.flops_per_s[item_bytes]
        multiplying_s = 2 * parameters * tokens / peak
        return float((reading_s**OVERLAP + multiplying_s**OVERLAP) ** (1 / OVERLAP))


class PoolingBound(msgspec.Struct, frozen=True):
    """The most that streaming KV can bring a decode iteration, by arithmetic alone."""

    streamed_bytes: float
    """KV that hides behind one iteration."""
    expansion_ratio: float
    throughput_gain: float
    """Of decode-only iterations; the larger batch also takes longer."""


def pooling_bound(
    weight_bytes: float, kv_bytes: float, link_to_hbm: float, *, is_staged: bool = True
) -> PoolingBound:
    """The bound of streaming `O` bytes beside weights `W` and resident KV `K`.

    An iteration takes at least (W + K + c O) / B_hbm, with c = 2 where staged bytes are
    written to HBM first and c = 1 where attention reads the pool in place; O hides while
    O <= B_link x that time.

    Args:
        weight_bytes: W, read once per iteration.
        kv_bytes: K, resident and read once per iteration.
        link_to_hbm: r = B_link / B_hbm.
        is_staged: whether streamed KV passes through HBM.
    """
    crossings = 2 if is_staged else 1
    resident_bytes = weight_bytes + kv_bytes
    if crossings * link_to_hbm >= 1:
        return PoolingBound(math.inf, math.inf, resident_bytes / (crossings * kv_bytes))
    streamed_bytes = link_to_hbm * resident_bytes / (1 - crossings * link_to_hbm)
    ratio = (kv_bytes + streamed_bytes) / kv_bytes
    gain = ratio * resident_bytes / (resident_bytes + crossings * streamed_bytes)
    return PoolingBound(streamed_bytes, ratio, gain)


# --- named hardware and models --------------------------------------------------------------

GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # measured: 4.1-4.2 TB/s of the 4.8 on the sheet; the others keep that share (0.875)
        Gpu(
            name="h200",
            memory_bytes=141_000_000_000,
            hbm_bytes_per_s=4.2e12,
            flops_per_s={1: 1979e12, 2: 989e12, 4: 494e12},
        ),
        Gpu(
            name="h100",
            memory_bytes=80 * GIB,
            hbm_bytes_per_s=2.93e12,
            flops_per_s={1: 1979e12, 2: 989e12, 4: 494e12},
        ),
        Gpu(
            name="gh200",
            memory_bytes=96_000_000_000,
            hbm_bytes_per_s=3.5e12,
            flops_per_s={1: 1979e12, 2: 989e12, 4: 494e12},
        ),
        Gpu(
            name="b200",
            memory_bytes=180_000_000_000,
            hbm_bytes_per_s=7.0e12,
            flops_per_s={1: 4500e12, 2: 2250e12, 4: 1100e12},
        ),
        Gpu(
            name="a100",
            memory_bytes=80 * GIB,
            hbm_bytes_per_s=1.78e12,
            flops_per_s={1: 312e12, 2: 312e12, 4: 156e12},
        ),
        Gpu(
            name="l40s",
            memory_bytes=48 * GIB,
            hbm_bytes_per_s=0.756e12,
            flops_per_s={1: 733e12, 2: 366e12, 4: 183e12},
        ),
        Gpu(
            name="rtx4090",
            memory_bytes=24 * GIB,
            hbm_bytes_per_s=0.88e12,
            flops_per_s={1: 330e12, 2: 165e12, 4: 83e12},
        ),
    )
}

LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link(name="pcie3", bytes_per_s=12.4e9, latency_s=4e-6, run_s=0.55e-6),
        Link(name="pcie4", bytes_per_s=26e9, latency_s=4e-6, run_s=0.55e-6),
        # measured: 55.4 GB/s contiguous; batched 64 KiB blocks 38 GB/s, 1 MiB blocks 53
        Link(name="pcie5", bytes_per_s=55.4e9, latency_s=4e-6, run_s=0.55e-6),
        # measured between two H200s; batched 64 KiB blocks 78 GB/s, 256 KiB blocks 196
        Link(name="nvlink", bytes_per_s=393e9, latency_s=4e-6, run_s=0.65e-6, staging_traffic=1.15),
        # published for GH200: 377-419 GB/s to the GPU
        Link(
            name="nvlink-c2c",
            bytes_per_s=400e9,
            latency_s=4e-6,
            run_s=0.65e-6,
            staging_traffic=1.15,
        ),
    )
}

SHAPES: Mapping[str, ModelShape] = {
    "tiny": ModelShape(
        num_layers=4,
        hidden_size=256,
        num_heads=4,
        kv_heads=2,
        head_dim=64,
        intermediate_size=1024,
        vocab_size=1024,
    ),
    "opt-13b": ModelShape(
        num_layers=40,
        hidden_size=5120,
        num_heads=40,
        kv_heads=40,
        head_dim=128,
        intermediate_size=20480,
        vocab_size=50272,
        is_gated=False,
    ),
    "llama-3.1-8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
    ),
    "llama-3.1-70b": ModelShape(
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate_size=28672,
        vocab_size=128256,
    ),
    "qwen2.5-32b": ModelShape(
        num_layers=64,
        hidden_size=5120,
        num_heads=40,
        kv_heads=8,
        head_dim=128,
        intermediate_size=27648,
        vocab_size=152064,
    ),
}

USUAL_LINKS: Mapping[str, str] = {
    "h200": "pcie5",
    "h100": "pcie5",
    "gh200": "nvlink-c2c",
    "b200": "pcie5",
    "a100": "pcie4",
    "l40s": "pcie4",
    "rtx4090": "pcie4",
}
"""What joins a GPU to its host's memory where nothing else is said."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as `pie-async doctor --machine FILE` measured it: to be simulated."""

    gpu: Gpu
    link: Link

    @classmethod
    def read(cls, path: Path, *, option: str) -> Machine:
        """
        Raises:
            ConfigError: there is no such file, or it is no machine's.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", option=option) from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not what `pie-async doctor --machine FILE` writes: {error}",
                option=option,
            ) from error


_MACHINE_FILE = ".json"
_Named = TypeVar("_Named")


def gpu_named(name: str, *, option: str = "sim_gpu") -> Gpu:
    """The GPU of this name, or of the machine in a file.

    Raises:
        ConfigError: unknown; lists the known ones.
    """
    if name.endswith(_MACHINE_FILE):
        return Machine.read(Path(name), option=option).gpu
    return _named(GPUS, name, "GPU", option)


def link_named(name: str, *, option: str = "sim_link") -> Link:
    """The link of this name, or of the machine in a file; raises ConfigError as `gpu_named`."""
    if name.endswith(_MACHINE_FILE):
        return Machine.read(Path(name), option=option).link
    return _named(LINKS, name, "link", option)


def shape_named(name: str, *, option: str = "model") -> ModelShape:
    """The model shape of this name; raises ConfigError as `gpu_named`."""
    return _named(SHAPES, name, "model shape", option)


def _named(known: Mapping[str, _Named], name: str, kind: str, option: str) -> _Named:
    try:
        return known[name]
    except KeyError:
        raise ConfigError(
            f"there is no {kind} named {name!r}; known are {', '.join(known)}", option=option
        ) from None
