"""How an engine is set up: one frozen struct, checked when it is made."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Literal, get_args

import msgspec

from pie_async.errors import ConfigError
from pie_async.settings import setting

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

DeviceName = Literal["cpu", "cuda", "sim"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
LoadFormat = Literal["checkpoint", "random"]
Quantization = Literal["fp8"]
Kernels = Literal["triton", "torch"]
Attention = Literal["auto", "triton", "flashinfer"]

BUILTIN_MODEL = "builtin"
"""The small model shipped with the package."""
DEVICE_KV_BYTES = 256 * MIB
"""The device arena of devices whose memory nobody has to share out: cpu and sim."""
MAX_STREAMED_BYTES = 2 * GIB
"""In an iteration on a GPU, unless configured: what PCIe 5 moves in 40 ms, more than hides behind
the iterations of most loads."""
PEER_MAX_STREAMED_BYTES = 12 * GIB
"""The same for a pool in another GPU: what NVLink moves in 32 ms. Where the ring limits what is
streamed, blocks find no staging slot of their own number, and copies become many."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an `Engine` can be told: the source of flags, environment variables, TOML keys.

    Raises:
        ConfigError: on construction, naming the field (`option`) and what is possible.
    """

    model: str = BUILTIN_MODEL
    """A local Hugging Face directory, a hub id, or "builtin"; with random weights also the
    name of a shape (`model/named_shapes.py`)."""
    load_format: Annotated[
        LoadFormat,
        setting(
            "--load-format",
            "words",
            "Where weights come from; random needs a config.json or a shape's name alone.",
        ),
    ] = "checkpoint"
    """"random": seeded random weights, made on the device; of the model only config.json is
    read. For measurements: time does not depend on what weights are."""
    device: Annotated[
        DeviceName,
        setting(
            "--device", "words", "Where the model runs; sim runs on a cost model, without tensors."
        ),
    ] = "cpu"
    dtype: Annotated[
        DtypeName,
        setting("--dtype", "words", "What the model computes in; auto is float32 on the CPU."),
    ] = "auto"
    """What the model computes in; "auto" is float32 on the CPU, the model's own on a GPU."""
    quantization: Annotated[
        Quantization | None,
        setting(
            "--quantization",
            "words",
            "What weights are converted to when loaded (cuda).",
            default="none",
        ),
    ] = None
    """What weights are converted to when they are loaded; None: they stay in `dtype`."""
    kernels: Annotated[
        Kernels,
        setting(
            "--kernels",
            "words",
            "torch computes with torch's own operators, slowly, as a reference (cuda).",
        ),
    ] = "triton"
    """CUDA device: "torch" computes with torch's own operators, slowly, as a reference."""
    attention: Annotated[
        Attention,
        setting(
            "--attention",
            "words",
            "What attention of prompts is computed with; auto: what was measured faster (cuda).",
        ),
    ] = "auto"
    """CUDA device: what attention of prompts is computed with. "auto": FlashInfer (extra
    `flashinfer`) where it is installed and was measured faster on this card, otherwise Triton."""
    cuda_graphs: Annotated[
        bool,
        setting(
            "--cuda-graphs",
            "switch",
            "Replay decode iterations instead of launching their kernels one by one (cuda).",
        ),
    ] = True
    """CUDA device: replay decode iterations instead of launching their kernels one by one."""
    gpu_memory: Annotated[
        str | int | float,
        setting(
            "--gpu-memory",
            "share",
            "Cap of everything taken on the card: 80GiB, 0.9 or 90% (cuda).",
            panel="Memory",
        ),
    ] = 0.9
    """CUDA device: cap of everything the process takes on the card, in bytes ("80GiB", an
    int) or as a share of the card (0.9, "90%")."""
    device_kv_bytes: Annotated[
        int | None,
        setting(
            "--device-kv",
            "size",
            "Device arena: KV that is resident.",
            default="256.0 MiB; on cuda what --gpu-memory leaves",
            panel="Memory",
        ),
    ] = None
    """The device arena: KV that is resident. None: 256 MiB; on the CUDA device, what
    everything else leaves under `gpu_memory`."""
    host_pool_bytes: Annotated[
        int,
        setting(
            "--host-pool",
            "size",
            "Ceiling of the pool, wherever it is; 0 switches pooling off.",
            panel="Memory",
        ),
    ] = 1 * GIB
    """Ceiling of the pool, whichever memory it lies in; 0 switches pooling off (preemption
    recomputes)."""
    pool: Annotated[
        str,
        setting(
            "--pool",
            "pool",
            "Memory that holds the pool: this machine's, or GPU N's (cuda).",
            panel="Memory",
        ),
    ] = "host"
    """What memory holds the pool: "host", this machine's, or on the CUDA device "peer:N", GPU N's
    (among those that the process sees), which is to be joined to the computing one by NVLink."""
    pool_idle_s: Annotated[
        float,
        setting(
            "--pool-idle",
            "seconds",
            "Give host memory of the pool back after so long without need; 0 keeps it.",
            panel="Memory",
        ),
    ] = 60.0
    """Host memory of the pool that was not needed for so long is given back, and taken again on
    demand; 0: it is kept. A pool in another GPU always keeps its memory."""
    max_streamed_bytes: Annotated[
        int | None,
        setting(
            "--max-streamed",
            "size",
            "Most KV that an iteration may stream (cuda).",
            default=f"{MAX_STREAMED_BYTES // GIB}GiB (with --pool peer:N "
            f"{PEER_MAX_STREAMED_BYTES // GIB}GiB), or what --max-model-len needs",
            panel="Memory",
        ),
    ] = None
    """CUDA device: most KV that one iteration may stream. The staging ring takes its share of it,
    `ring_depth` layer groups of all. None: 2 GiB, 8 with the pool in
    another GPU, or what `max_model_len` needs if that is set."""
    block_tokens: Annotated[
        int, setting("--block-tokens", "count", "Tokens of one KV block.", panel="Memory")
    ] = 16
    max_model_len: Annotated[
        int | None,
        setting(
            "--max-model-len",
            "count",
            "Longest prompt plus output, in tokens.",
            default="what model and memory hold",
        ),
    ] = None
    """Longest prompt plus output; None: what the model and the memory can hold."""
    max_running_sequences: Annotated[
        int | None,
        setting(
            "--max-running", "count", "Most sequences in one iteration.", default="64; on cuda 256"
        ),
    ] = None
    """Most sequences in one iteration; None: 64, on the CUDA device 256."""
    token_budget: Annotated[
        int | None,
        setting(
            "--token-budget", "count", "Most tokens in one iteration.", default="512; on cuda 8192"
        ),
    ] = None
    """Most tokens one iteration processes; longer prompts are prefilled in chunks. None: 512;
    on the CUDA device what `itl_target_s` allows, 8192 without one."""
    itl_target_s: Annotated[
        float | None,
        setting(
            "--itl-target",
            "seconds",
            "Most time between two tokens while others prefill; sets the token budget (cuda).",
            default="no target",
        ),
    ] = None
    """CUDA device: how long an iteration that prefills may take, which is what others wait for
    their next token meanwhile. Sets `token_budget`, so only one of the two may be given."""
    itl_limit_s: Annotated[
        float | None,
        setting(
            "--itl-limit",
            "seconds",
            "Most time that an iteration may take for the sake of streaming.",
            default="no limit",
        ),
    ] = None
    """What an iteration that only decodes may take for streaming's sake: no more is streamed than
    keeps it below. None: streaming is limited by what hides behind compute alone."""
    prefix_caching: Annotated[
        bool,
        setting(
            "--prefix-caching",
            "switch",
            "Share the KV of equal leading tokens, also of requests that have ended.",
        ),
    ] = True
    """Requests with the same leading tokens share KV blocks, also with those that have ended."""
    iterations_in_flight: Annotated[
        int,
        setting(
            "--iterations-in-flight",
            "count",
            "Iterations issued before tokens are back.",
            metavar="1|2",
        ),
    ] = 2
    """Iterations issued before the first one's tokens are back: 1 or 2."""
    layer_group: Annotated[
        int | None,
        setting(
            "--layer-group",
            "count",
            "Most layers staged and awaited as one.",
            default="as suits the device",
            panel="Memory",
        ),
    ] = None
    """Most layers staged and awaited as one; None: as suits the device. Groups are made as equal as
    can be, and one more of them where the ring's depth would leave 1 over."""
    ring_depth: Annotated[
        int | None,
        setting(
            "--ring-depth",
            "count",
            "Layer groups that the staging ring holds.",
            default="as suits the device",
            panel="Memory",
        ),
    ] = None
    """Layer groups that the staging ring holds, at least 2; None: as suits the device."""
    link_bytes_per_s: Annotated[
        float | None,
        setting(
            "--link-rate",
            "rate",
            "Limit the link between host pool and arena (cpu).",
            default="no limit",
            panel="Memory",
        ),
    ] = None
    """CPU device: rate of the link between host pool and arena; None: as fast as it goes."""
    streamed_blocks: Annotated[
        int | None,
        setting(
            "--streamed-blocks",
            "count",
            "Fix how many blocks may be streamed.",
            default="the governor decides",
            panel="Memory",
        ),
    ] = None
    """Fix the number of blocks that may be streamed; None lets the governor decide."""
    exchange: Annotated[
        bool,
        setting(
            "--exchange",
            "switch",
            "Copy streamed KV back after every layer group too, for measurements.",
            panel="Memory",
        ),
    ] = False
    """For measurements: after every layer group copy what was staged for it back to the pool, as
    the paper does, although it has not changed. The pool then keeps its memory, and with `debug`
    staging buffers are not poisoned."""
    max_queued_requests: Annotated[
        int, setting("--max-queued", "count", "More requests than this are refused.")
    ] = 4096
    """Requests that are accepted and not finished; further ones are told when to come again."""
    max_queued_tokens: Annotated[
        int,
        setting(
            "--max-queued-tokens", "count", "The same for tokens of their prompts.", default="16Mi"
        ),
    ] = 16 * 2**20
    """The same for their prompts' tokens, once for each sequence; one alone may have more."""
    reader_patience_s: Annotated[
        float,
        setting(
            "--reader-patience",
            "seconds",
            "Pause a request whose reader takes nothing for so long; 0: never.",
        ),
    ] = 30.0
    """A request whose reader has begun to read and then takes nothing for so long is paused until
    it reads on: its sequences give up their places, and their KV as soon as somebody wants the
    room. 0: never."""
    watchdog_s: Annotated[
        float,
        setting(
            "--watchdog",
            "seconds",
            "End the engine, with a report, if it stands still for so long; 0: never.",
        ),
    ] = 60.0
    """Issued work that has not completed, a message that was not read, or an event loop that did
    not turn for so long stops the engine, with a report; at most a quarter longer. What a stream
    is given first may take ten times as long. 0: nobody looks."""
    report_dir: Annotated[
        str | None,
        setting(
            "--report-dir",
            "text",
            "Where reports go.",
            default="in the user's cache directory",
            metavar="DIR",
        ),
    ] = None
    """Where reports go; None: "pie_async/reports" in the user's cache directory."""
    cpu_threads: Annotated[
        int | None,
        setting(
            "--cpu-threads",
            "count",
            "Threads of one torch operation (cpu).",
            default="all cores but one",
        ),
    ] = None
    """CPU device: threads per torch operation; None: all cores but one."""
    debug: Annotated[
        bool,
        setting(
            "--debug",
            "switch",
            "Show where errors come from; poison staging buffers, check invariants.",
        ),
    ] = False
    """Poison staging buffers, check invariants at every message and plan."""
    check_copies: Annotated[
        bool,
        setting(
            "--check-copies",
            "switch",
            "Compare checksums of copied blocks; what is wrong is copied or computed again.",
        ),
    ] = False
    """Compare the checksum of every copied block. What arrived otherwise is copied again; on a GPU,
    where it may be read by then, its sequences are computed again."""
    seed: Annotated[
        int, setting("--seed", "count", "Seeds of requests without one are drawn from it.")
    ] = 0
    """Where seeds of requests without one are drawn from."""
    sim_gpu: Annotated[
        str,
        setting(
            "--sim-gpu",
            "text",
            "GPU whose cost model runs.",
            panel="Simulated device",
            metavar="NAME",
        ),
    ] = "h200"
    """Simulated device: the GPU whose cost model runs."""
    sim_link: Annotated[
        str,
        setting(
            "--sim-link", "text", "Link to the pool.", panel="Simulated device", metavar="NAME"
        ),
    ] = "pcie5"
    """Simulated device: the link to the pool."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("block_tokens", "max_queued_requests", "max_queued_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("host_pool_bytes", self.host_pool_bytes, 0)
        for name, least in (
            ("device_kv_bytes", 1),
            ("max_streamed_bytes", 1),
            ("max_running_sequences", 1),
            ("token_budget", 1),
            ("layer_group", 1),
            ("ring_depth", 2),
            ("max_model_len", 1),
            ("cpu_threads", 1),
            ("streamed_blocks", 0),
        ):
            if (value := getattr(self, name)) is not None:
                _at_least(name, value, least)
        if self.streamed_blocks and not self.host_pool_bytes:
            raise ConfigError(
                f"streamed_blocks is {self.streamed_blocks}, but host_pool_bytes is 0: what is "
                "streamed lies in the host pool",
                option="streamed_blocks",
            )
        self._check_gpu()
        self._check_pool()
        if not 0 <= self.pool_idle_s < math.inf:
            raise ConfigError(
                f"pool_idle_s must be at least 0, not {self.pool_idle_s}; 0 keeps the "
                "pool's memory",
                option="pool_idle_s",
            )
        self._check_patience()
        self._check_itl_limit()
        if self.iterations_in_flight not in (1, 2):
            raise ConfigError(
                f"iterations_in_flight must be 1 or 2, not {self.iterations_in_flight}",
                option="iterations_in_flight",
            )
        if self.link_bytes_per_s is not None and not self.link_bytes_per_s > 0:
            raise ConfigError(
                f"link_bytes_per_s must be above 0, not {self.link_bytes_per_s}; "
                "leave it out for no limit",
                option="link_bytes_per_s",
            )

    def _check_patience(self) -> None:
        for name in ("watchdog_s", "reader_patience_s"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(
                    f"{name} must be at least 0, not {value}; 0 switches it off", option=name
                )

    def _check_gpu(self) -> None:
        check_gpu_memory(self.gpu_memory)
        _time_or_none("itl_target_s", self.itl_target_s)
        if self.itl_target_s is not None and self.token_budget is not None:
            raise ConfigError(
                "itl_target_s and token_budget set the same thing; give one of them",
                option="itl_target_s",
            )

    def _check_pool(self) -> None:
        place = parse_pool(self.pool)
        if place.peer is not None and self.device != "cuda":
            instead = "; sim_link nvlink simulates it" if self.device == "sim" else ""
            raise ConfigError(
                f"pool {place} is memory of a GPU, and device is {self.device}; use pool host or "
                f"device cuda{instead}",
                option="pool",
            )

    def _check_itl_limit(self) -> None:
        _time_or_none("itl_limit_s", self.itl_limit_s)
        if self.itl_limit_s is not None and self.streamed_blocks is not None:
            raise ConfigError(
                "itl_limit_s is for the governor, and streamed_blocks fixes what it would decide; "
                "give one of them",
                option="itl_limit_s",
            )

    def _check_types(self) -> None:
        if isinstance(self.model, os.PathLike):
            msgspec.structs.force_setattr(self, "model", os.fspath(self.model))
        for name, choices in (
            ("device", get_args(DeviceName)),
            ("dtype", get_args(DtypeName)),
            ("load_format", get_args(LoadFormat)),
            ("kernels", get_args(Kernels)),
            ("attention", get_args(Attention)),
            ("quantization", (None, *get_args(Quantization))),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}",
                    option=name,
                )
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise ConfigError(
                    f"{field.name} is {value!r}: {error}", option=field.name
                ) from None


def _time_or_none(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(
            f"{name} must be above 0, not {value}; leave it out for none", option=name
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", option=name)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)
_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": KIB,
    "mi": MIB,
    "gi": GIB,
    "ti": TIB,
}


def parse_size(text: str, *, option: str) -> int:
    """Bytes from "64MiB", "1.5 GiB", "500MB" or a plain number.

    Raises:
        ConfigError: not a size; names the option.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{option} is not a size: {text!r}; write for example 64MiB, 1.5GiB or 500MB",
            option=option,
        )
    number, unit = match.groups()
    return int(float(number) * _UNITS[(unit or "").lower()])


class PoolPlace(msgspec.Struct, frozen=True):
    """What `EngineConfig.pool` means: which memory holds the pool."""

    peer: int | None = None
    """Ordinal of the GPU whose memory it is, among those that this process sees; None: the host's
    memory."""

    def __str__(self) -> str:
        return "host" if self.peer is None else f"peer:{self.peer}"


_PEER = re.compile(r"peer:([0-9]{1,3})")


def parse_pool(text: str) -> PoolPlace:
    """The place from "host" or "peer:N".

    Raises:
        ConfigError: neither of them; lists both.
    """
    name = text.strip()
    if name == "host":
        return PoolPlace()
    if match := _PEER.fullmatch(name):
        return PoolPlace(peer=int(match[1]))
    raise ConfigError(
        f"pool must be host (this machine's memory) or peer:N (memory of GPU N, for example "
        f"peer:1), not {text!r}",
        option="pool",
    )


_LEAST_GPU_BYTES = MIB
"""Less cannot be meant as bytes: a share that was miswritten."""


def check_gpu_memory(value: str | float) -> float:
    """What `EngineConfig.gpu_memory` means: a share of the card up to 1, otherwise bytes.

    Raises:
        ConfigError: neither a share above 0 and up to 1 nor a size.
    """
    meant: float = 0.0
    if not isinstance(value, str):
        meant = value
    elif match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value):
        meant = float(match[1]) / 100
    elif match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", value):
        meant = float(match[1])
    else:
        try:
            meant = parse_size(value, option="gpu_memory")
        except ConfigError:
            raise _no_gpu_memory(value) from None
    if not (0 < meant <= 1 or _LEAST_GPU_BYTES <= meant < math.inf):
        raise _no_gpu_memory(value)
    return meant


def _no_gpu_memory(value: str | float) -> ConfigError:
    return ConfigError(
        f"gpu_memory must be a share of the card above 0 and up to 1 (0.9 or 90%) or a size "
        f"(80GiB), not {value!r}",
        option="gpu_memory",
    )


def format_size(num_bytes: float) -> str:
    """Bytes for people: "64.0 MiB"."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
