"""Measures what a process takes on its card, by the driver's figures, and plans the arena.

What torch says that it holds leaves out the CUDA context, loaded kernels and captured graphs;
so everything here is a difference of the driver's free memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from pie_async.config import format_size
from pie_async.core.layout import KvLayout
from pie_async.cuda.memory_budget import (
    FEWEST_SLOTS,
    GRAPHS_BYTES,
    SLACK_BYTES,
    Card,
    Demand,
    GpuMemory,
    require_weights,
    share_out,
)
from pie_async.cuda.profiling import PLAIN, WIDEST
from pie_async.cuda.vmm import DeviceArena
from pie_async.errors import ConfigError
from pie_async.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver

_log = logging.getLogger(__name__)


class ProfiledRunner(Protocol):
    """What measuring asks of a model runner."""

    has_room: Callable[[], bool]
    """Asked, on the launch thread, before a graph is captured later than at the start."""

    @property
    def graph_bytes(self) -> int:
        """What the graphs captured so far take."""

    def profile(self, num_tokens: int, sampling: SamplingParams) -> int:
        """Run an eager pass of `largest_iteration`, which writes slot 0 and binds lanes: so it is
        for a runner that nobody uses yet.

        Returns: bytes of torch's memory that it needed at its peak, beyond what it found in use.
        """


MakeRunner = Callable[[Sequence[torch.Tensor]], ProfiledRunner]
"""From the arena's layers."""


class CardMemory:
    """One process's memory on one card, from the opened driver to the running device.

    Args:
        driver: just opened, a neighbour too if there is to be one; nothing else was allocated.
        gpu_memory: `EngineConfig.gpu_memory`.

    Raises:
        ConfigError: the cap is more than the card has.
    """

    def __init__(self, driver: Driver, gpu_memory: str | float) -> None:
        self._driver = driver
        # What torch keeps of an engine before this one would count as somebody else's, and be
        # promised to the arena as soon as it is given back.
        driver.trim()
        driver.limit_torch(driver.total_bytes())  # an engine before this one may have set less
        self._torch_bytes = driver.torch_bytes()
        self._first_tensor_bytes = self._tensor_bytes()
        self._card = Card(total_bytes=driver.total_bytes(), free_bytes=driver.free_bytes())
        self._cap_bytes = self._card.cap_bytes(gpu_memory)
        self._plan: GpuMemory | None = None

    @property
    def kv_room_bytes(self) -> int:
        """What is left under the cap now."""
        return max(0, self._card.reach_bytes(self._cap_bytes) - self._used_bytes())

    def require_weights(self, weight_bytes: int, dtype_name: str) -> None:
        """See `memory_budget.require_weights`."""
        require_weights(
            weight_bytes, self._card, self._cap_bytes, gpu=self._driver.name, dtype_name=dtype_name
        )

    def plan(
        self,
        make_runner: MakeRunner,
        layout: KvLayout,
        dtype: torch.dtype,
        *,
        device_slots: int | None,
        staging_slots: int,
        token_budget: int,
        decode_rows: int,
    ) -> GpuMemory:
        """Profile a runner on a small arena and share the memory out. The weights are loaded.

        Args:
            device_slots: None: as many as there is room for.

        Raises:
            ConfigError: too little memory; says what everything takes.
        """
        self._driver.synchronize_device()
        self._driver.trim()
        # Small weights may lie in what torch keeps beside tensors of an engine before this one,
        # where the driver does not see them.
        weight_bytes = max(
            self._used_bytes() - self._card.context_bytes,
            self._tensor_bytes() - self._first_tensor_bytes,
        )
        activation_bytes, decode_bytes = self._profile(
            make_runner, layout, dtype, token_budget=token_budget, decode_rows=decode_rows
        )
        demand = Demand(
            context_bytes=self._card.context_bytes,
            weight_bytes=weight_bytes,
            activation_bytes=activation_bytes,
            graph_bytes=GRAPHS_BYTES + decode_bytes,
            staging_slots=staging_slots,
        )
        self._plan = share_out(
            self._card.reach_bytes(self._cap_bytes),
            demand,
            layout,
            page_bytes=self._driver.page_bytes,
            device_slots=device_slots,
        )
        return self._plan

    def settle(self, runner: ProfiledRunner) -> None:
        """Everything is set up: keep torch below the cap from now on, and say where memory is."""
        self._driver.synchronize_device()
        self._limit_torch(SLACK_BYTES)
        runner.has_room = self.has_room
        for line in self.report(runner).lines():
            _log.info("%s", line)

    def has_room(self) -> bool:
        """Whether the largest iteration leaves something under the cap, for another graph: the
        driver's memory for those is none of torch's, so torch's limit does not hold them."""
        assert self._plan is not None
        missing_bytes = self._plan.activation_bytes - self._driver.torch_kept_bytes()
        return self._used_bytes() + max(0, missing_bytes) < self._cap_bytes

    def report(self, runner: ProfiledRunner) -> GpuMemory:
        """The plan, with what graphs take and what is in use as of now; from any thread."""
        assert self._plan is not None
        self._driver.enter_thread()
        return msgspec.structs.replace(
            self._plan,
            cap_bytes=self._cap_bytes,
            graph_bytes=runner.graph_bytes,
            used_bytes=self._used_bytes(),
        )

    def _used_bytes(self) -> int:
        return self._card.used_bytes(self._driver.free_bytes())

    def _tensor_bytes(self) -> int:
        return self._driver.torch_bytes() - self._driver.torch_kept_bytes()

    def _limit_torch(self, reserve_bytes: int) -> None:
        """Let torch take what is left under the cap, but for a reserve."""
        torch_bytes = self._driver.torch_bytes()
        beside_bytes = self._used_bytes() - (torch_bytes - self._torch_bytes)
        limit_bytes = self._cap_bytes - beside_bytes - reserve_bytes
        self._driver.limit_torch(self._torch_bytes + limit_bytes)

    def _profile(
        self,
        make_runner: MakeRunner,
        layout: KvLayout,
        dtype: torch.dtype,
        *,
        token_budget: int,
        decode_rows: int,
    ) -> tuple[int, int]:
        """Work space of the largest iteration, with all that comes with it, and of a decode that
        a graph can hold.

        Raises:
            ConfigError: there is not enough for the largest iteration.
        """
        driver = self._driver
        before_bytes = self._used_bytes()
        arena = DeviceArena(driver, layout, device_slots=FEWEST_SLOTS, staging_slots=0, dtype=dtype)
        try:
            arena_bytes = self._used_bytes() - before_bytes
            room_bytes = self.kv_room_bytes
            self._limit_torch(0)
            runner = make_runner(arena.layers)
            decode_bytes = runner.profile(decode_rows, PLAIN)
            runner.profile(token_budget, WIDEST)
            # Compiling and tuning kernels took memory of its own, once: so measure again.
            driver.trim()
            peak_bytes = runner.profile(token_budget, WIDEST)
            driver.synchronize_device()
            # Of the driver's count too: kernels, tables, and what torch's allocator rounds up.
            grown_bytes = self._used_bytes() - before_bytes - arena_bytes
            del runner
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"an iteration of {token_budget} tokens does not fit into the "
                f"{format_size(room_bytes)} that gpu_memory "
                f"{format_size(self._cap_bytes)} leaves beside the weights; lower token_budget "
                "or max_running_sequences, or raise gpu_memory",
                option="token_budget",
            ) from error
        finally:
            driver.synchronize_device()
            arena.close()
            driver.trim()
        return max(peak_bytes, grown_bytes), decode_bytes
