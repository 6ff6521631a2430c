"""The loop body: schedule, execute, update. Everything that happens to a request happens inside
`step`.

With asynchronous scheduling one step is in flight while the next is planned from bounds.

Knows: the order, and what to do when a program fails. Does not know: text, clients, devices.
"""

from __future__ import annotations

from collections import deque

from vllm_core.engine.kv_cache import KVCache
from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Event, Request, Sequence
from vllm_core.engine.scheduler import Scheduler
from vllm_core.errors import CapacityError, DeviceLost, InvalidArgument, NotSupported
from vllm_core.log import get_logger
from vllm_core.outputs import FinishReason
from vllm_core.plan import Plan
from vllm_core.runner.runner import ModelRunner, StepHandle

logger = get_logger(__name__)

MAX_FAILURES = 3
"""Failed steps in a row, without a good one between them, after which the engine gives up."""


class EngineCore:
    """One scheduler over one runner."""

    def __init__(self, runner: ModelRunner, limits: Limits, *, is_async: bool = True) -> None:
        sizes = runner.sizes
        self.runner = runner
        kv = KVCache(runner.groups, sizes.num_blocks, sizes.num_rows, sizes.max_tokens)
        self.scheduler = Scheduler(kv, limits)
        self.num_ahead = 1 if is_async and not runner.runtime.caps.exact_host_lengths else 0
        self._in_flight: deque[tuple[Plan, StepHandle]] = deque()
        self._num_failures = 0

    def add(self, request: Request) -> None:
        """Queues a request. InvalidArgument for an id that runs already, CapacityError if it never
        fits."""
        if request.request_id in self.scheduler.requests:
            raise InvalidArgument(f"request id {request.request_id!r} is running already")
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends a sequence from outside, such as one whose text holds a stop string."""
        if not sequence.is_finished:
            self.scheduler.finish(sequence, reason, stop_reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def is_stalled(self) -> bool:
        """Nothing is in flight and every running request is paused: a step would do nothing."""
        rows = self.scheduler.rows
        runs = bool((rows.active & ~rows.paused).any())
        return not self._in_flight and not runs and not self.scheduler.waiting

    def step(self) -> list[Event]:
        """Plans and submits a step, then takes in the oldest one in flight. May return nothing."""
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._in_flight.append((plan, self.runner.execute(plan)))
            except Exception as error:
                return self._recover(error)
        if self._in_flight and (plan is None or len(self._in_flight) > self.num_ahead):
            oldest, handle = self._in_flight.popleft()
            try:
                result, scores = handle.wait()
            except Exception as error:
                return self._recover(error)
            self._num_failures = 0
            return self.scheduler.update(oldest, result, scores)
        requests = self.scheduler.requests.values()
        if plan is None and requests and not any(r.is_paused for r in requests):
            raise CapacityError("no waiting request fits the KV cache; raise kv_cache_memory")
        return []

    def _recover(self, error: Exception) -> list[Event]:
        """A program failed, so state and cache are undefined: start both anew, resume by
        recomputation."""
        self._num_failures += 1
        self._in_flight.clear()
        is_final = isinstance(error, (DeviceLost, InvalidArgument, NotSupported, AssertionError))
        if is_final or self._num_failures >= MAX_FAILURES:
            raise error
        logger.warning("a step failed, all running sequences are computed anew: %s", error)
        self.scheduler.restart()
        self.runner.reset()
        return []

    def stats(self) -> dict[str, int]:
        """Counters and the use of the cache, now."""
        scheduler, pools = self.scheduler, self.scheduler.kv.pools
        own = scheduler.stats
        return {
            "kv_blocks_total": sum(p.num_usable for p in pools),
            "kv_blocks_used": sum(p.num_used for p in pools),
            "kv_blocks_cached": sum(p.num_cached for p in pools),
            "running": int(scheduler.rows.active.sum()),
            "waiting": len(scheduler.waiting),
            "num_steps": own.num_steps,
            "preemptions": own.num_preemptions,
            "prompt_tokens": own.num_prompt_tokens,
            "prefix_hit_tokens": own.num_hit_tokens,
            "output_tokens": own.num_drawn_tokens,
            "bucket_misses": self.runner.num_bucket_misses,
        }

    def close(self) -> None:
        for request_id in list(self.scheduler.requests):
            self.scheduler.abort(request_id)
        self._in_flight.clear()
        self.runner.close()
