"""Decides which sequences run in the next step, and takes in what a step gave.

Continuous batching under one token budget: decoding rows first, then prompts in chunks, then new
sequences while rows and blocks last. Without blocks the sequence that ranks last is preempted and
later computed anew. Steps run ahead: a step is planned from bounds, before the tokens of the one
before it are known (seam, section 4).

Knows: token budget, free blocks, priorities, declared constraints. Does not know: tensors, devices,
text.
"""

from __future__ import annotations

import numpy as np

from vllm_core.engine import prefix_cache
from vllm_core.engine.kv_cache import KVCache
from vllm_core.engine.limits import Limits, Stats
from vllm_core.engine.queue import WaitingQueue, rank_of
from vllm_core.engine.request import Event, Request, Sequence
from vllm_core.engine.row_news import RowNews
from vllm_core.engine.rows import Rows
from vllm_core.errors import CapacityError, InvalidArgument
from vllm_core.ops import HostArray, Logprobs, StepResult
from vllm_core.outputs import FinishReason
from vllm_core.plan import Plan, PromptTargets, StepNeeds


class Scheduler:
    """Owns requests from arrival to end; everything else asks it."""

    def __init__(self, kv: KVCache, limits: Limits) -> None:
        self.kv, self.limits = kv, limits
        self.rows = Rows(limits.num_rows, limits.max_model_len + 4)
        self.waiting = WaitingQueue(limits.policy)
        self.requests: dict[str, Request] = {}
        self.stats = Stats()
        self._num_arrivals = 0
        self.news = RowNews(limits, self.rows)
        self._query = np.zeros(limits.num_rows, np.int64)
        budget = limits.token_budget
        if limits.constraints.max_tokens is not None:
            budget = min(budget, limits.constraints.max_tokens)
        if budget < limits.constraints.chunk_multiple:
            raise InvalidArgument(
                f"a step of {budget} tokens holds no prefill chunk, which this backend takes in "
                f"multiples of {limits.constraints.chunk_multiple}; raise max_num_batched_tokens"
            )
        self.token_budget = budget

    # ---------------------------------------------------------------- requests
    def add(self, request: Request) -> None:
        """Queues a request. CapacityError when it can never run."""
        length = len(request.prompt)
        if length >= self.limits.max_model_len:
            raise CapacityError(
                f"the prompt has {length} tokens, but the context holds "
                f"{self.limits.max_model_len} with at least one new token; shorten the prompt "
                "or raise max_model_len"
            )
        if not self.kv.fits_ever(request.end, self.token_budget):
            need = self.kv.blocks_for(request.end, self.token_budget)
            have = {i: pool.num_usable for i, pool in enumerate(self.kv.pools)}
            raise CapacityError(
                f"a sequence of {request.end} tokens needs {sum(need.values())} KV blocks, but the "
                f"cache has {sum(have.values())}; lower max_tokens or raise kv_cache_memory"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1 + request.sequences[-1].index  # one rank for each sequence
        request.hash_root = self._hash_root(request)
        self.requests[request.request_id] = request
        self.stats.num_prompt_tokens += length
        self.waiting.push(request.sequences[0])  # siblings follow when its prompt is computed

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """Ends a request wherever it is; unknown ids are ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    self.finish(sequence, reason)

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """Ends one sequence and frees what it holds."""
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.row >= 0:
            sequence.saved = self.rows.output(sequence.row)
            self._release(sequence.row)
        self._start_siblings(sequence)
        if sequence.request.is_finished:
            self.requests.pop(sequence.request.request_id, None)
            self.waiting.resume(sequence.request)

    def pause(self, request_id: str, paused: bool) -> None:
        """A paused request draws nothing, since its reader is slow; it keeps its blocks unless
        others need them."""
        request = self.requests.get(request_id)
        if request is None:
            return
        request.is_paused = paused
        for sequence in request.sequences:
            if sequence.row >= 0:
                self.rows.paused[sequence.row] = paused
        if not paused:
            self.waiting.resume(request)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # ---------------------------------------------------------------- planning
    def schedule(self) -> Plan | None:
        """The next step, or None when nothing can run now."""
        self._query = query = np.zeros(self.rows.num_rows, np.int64)
        if self.limits.constraints.mixed_ok:
            self._schedule_decodes()
            self._schedule_prefills()
        else:
            self._schedule_prefills()
            if not query.any():
                self._schedule_decodes()
        return self._plan(query) if query.any() else None

    def _schedule_decodes(self) -> None:
        """One token for every row that decodes."""
        r, query = self.rows, self._query
        rows = np.flatnonzero(
            r.active & ~r.paused & (r.bound >= r.goal) & (r.known + r.pending < r.end)
        )
        most = min(self.token_budget, self.limits.max_draws)
        if len(rows) > most:
            rows = rows[np.argsort(r.rank[rows], kind="stable")[:most]]
        query[rows] = 1
        upto = r.bound[rows] + 1
        self.kv.leave_window(rows, r.bound[rows])
        short = rows[self.kv.short_rows(rows, upto)]
        for row in short[np.argsort(r.rank[short], kind="stable")].tolist():
            if r.active[row]:
                self._grow(row, int(r.bound[row]) + 1)

    def _schedule_prefills(self) -> None:
        """Chunks of prompts that are under way, then of new sequences, in order of rank."""
        r, query, constraints = self.rows, self._query, self.limits.constraints
        running = np.flatnonzero(r.active & ~r.paused & (r.bound < r.goal))
        prefilling = running[np.argsort(r.rank[running], kind="stable")].tolist()
        chunks = constraints.max_prefills if constraints.max_prefills is not None else r.num_rows
        draws = self.limits.max_draws - int((query > 0).sum())
        coming: set[bytes] = set()
        held: list[Sequence] = []
        while query.sum() < self.token_budget and chunks > 0 and draws > 0:
            row = prefilling.pop(0) if prefilling else self._admit(coming, held)
            if row is None:
                break
            if not r.active[row]:
                continue
            left = self.token_budget - int(query.sum())  # _admit may preempt a row that was chosen
            chunk = self._chunk(int(r.goal[row] - r.bound[row]), left)
            if not chunk:
                break
            if not constraints.mixed_ok:
                chosen = query[query > 0]  # a single token is a decoding row to the device
                if len(chosen) and (chosen[0] == 1) != (chunk == 1):
                    continue
            self.kv.leave_window(np.array([row]), r.bound[row : row + 1])
            start, stop = int(r.bound[row]), int(r.bound[row]) + chunk
            if self._grow(row, stop):
                coming.update(self.kv.names(r.owner[row].hashes, start, stop))
                query[row] = chunk
                chunks -= 1
                draws -= 1
        for sequence in held:
            self.waiting.push(sequence)

    def _chunk(self, remaining: int, left: int) -> int:
        """Tokens of a prompt to compute now."""
        if remaining <= left:
            return remaining
        return left - left % self.limits.constraints.chunk_multiple

    def _grow(self, row: int, upto: int) -> bool:
        """Blocks below `upto`, preempting those that rank last. False: the row itself had to go."""
        while not self.kv.grow(row, upto):
            victim = self._last_ranked()
            self._preempt(victim)
            if victim == row:
                return False
        return True

    def _last_ranked(self) -> int:
        r = self.rows
        rank = np.where(
            r.active, r.rank + (r.paused.astype(np.int64) << 62), np.iinfo(np.int64).min
        )
        return int(rank.argmax())

    def _preempt(self, row: int) -> None:
        """Row and blocks go at once; tokens in flight still belong to the sequence."""
        r = self.rows
        sequence: Sequence = r.owner[row]
        sequence.saved = r.output(row)
        sequence.num_in_flight, sequence.epoch = int(r.pending[row]), int(r.epoch[row])
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._release(row)
        if not sequence.num_in_flight:
            self.waiting.push(sequence)

    def _release(self, row: int) -> None:
        r = self.rows
        self.kv.release(row)
        self._query[row] = 0  # it may have been chosen for the step that is being planned
        self.news.release(row)
        r.release(row)

    def _next_waiting(self, coming: set[bytes], held: list[Sequence]) -> Sequence | None:
        """The next sequence that may have a row.

        Those whose next block is `coming`, since a row of this step computes it, are moved to
        `held`: after this step they share it. Whoever overtakes them leaves a row to each.
        """
        while not held or len(held) < len(self.rows.free):
            sequence = self.waiting.peek()
            if sequence is None:
                return None
            root = sequence.request.hash_root
            if root is not None:
                self.kv.name_blocks(sequence.hashes, root, sequence.tokens())
            if not self.kv.awaits(sequence.hashes, sequence.max_hit, coming):
                return sequence
            held.append(self.waiting.pop())
        return None

    def _admit(self, coming: set[bytes], held: list[Sequence]) -> int | None:
        """Gives the next waiting sequence a row; None when none waits or it cannot have one."""
        sequence = self._next_waiting(coming, held)
        if sequence is None:
            return None
        tokens, max_hit = sequence.tokens(), sequence.max_hit
        while True:
            hit = None
            if self.rows.free and self.news.has_slots(sequence):
                row = self.rows.free[-1]
                hit = self.kv.admit(row, tokens, sequence.hashes, max_hit, self.token_budget)
            if hit is not None:
                break
            if not self._preempt_below(sequence):
                return None
        popped = self.waiting.pop()
        assert popped is sequence, "preempted sequences that stand before it are paused"
        rank = rank_of(sequence, self.limits.policy)
        self.rows.admit(sequence, tokens, hit, rank)
        self.stats.num_hit_tokens += hit
        sequence.has_shared = hit > 0
        if not sequence.num_preemptions:
            sequence.num_hit_tokens = hit
        self.news.admit(sequence, row, tokens, hit)
        return row

    def _preempt_below(self, sequence: Sequence) -> bool:
        """Preempts a paused row, or under the policy "priority" one that ranks strictly lower."""
        r = self.rows
        if not r.active.any():
            return False
        victim = self._last_ranked()
        other: Sequence = r.owner[victim]
        is_lower = other.request.priority > sequence.request.priority
        if not r.paused[victim] and not (self.limits.policy == "priority" and is_lower):
            return False
        self._preempt(victim)
        return True

    def _hash_root(self, request: Request) -> bytes | None:
        salt = request.salt
        if not self.limits.enable_prefix_caching:
            if request.params.n == 1:
                return None
            salt += b"\0" + str(request.arrival).encode()  # shares within the request
        return prefix_cache.root(salt)

    def _plan(self, query: HostArray) -> Plan:
        r = self.rows
        rows = np.flatnonzero(query)
        rows = rows[np.argsort(query[rows] > 1, kind="stable")]
        q, start = query[rows], r.bound[rows]
        draws = start + q >= r.goal[rows]
        first = np.cumsum(q) - q
        token_ids = np.full(int(q.sum()), -1, np.int32)
        for i in np.flatnonzero(start < r.goal[rows]).tolist():
            row, begin = rows[i], start[i]
            token_ids[first[i] : first[i] + q[i]] = r.tokens[row, begin : begin + q[i]]
        drawing = rows[draws]
        needs = StepNeeds(
            draw=bool(r.draw[drawing].any()),
            filters=bool(r.filters[drawing].any()),
            penalties=bool(r.penalties[drawing].any()),
            bias=bool(r.bias[drawing].any()),
            logprobs=int(r.logprobs[drawing].max(initial=-1)),
        )
        plan = Plan(
            rows=rows,
            owners=r.owner[rows],
            epochs=r.epoch[rows],
            start=start,
            query_len=q,
            draws=draws,
            token_ids=token_ids,
            resets=self.news.take_resets(rows),
            table_changes=self.kv.take_changes(),
            history_changes=self.news.take_history(),
            bias_changes=self.news.take_bias(),
            num_single=int((q == 1).sum()),
            needs=needs,
            prompt_targets=self._prompt_targets(rows, start, q, first),
        )
        r.bound[rows] = start + q
        r.pending[rows] += draws
        self._register(rows)
        self.stats.num_steps += 1
        return plan

    def _prompt_targets(
        self, rows: HostArray, start: HostArray, q: HostArray, first: HostArray
    ) -> tuple[PromptTargets, ...]:
        r, found = self.rows, []
        for i in np.flatnonzero(r.scores_prompt[rows] & (start < r.prompt_len[rows] - 1)).tolist():
            row, begin = int(rows[i]), int(start[i])
            end = min(begin + int(q[i]) + 1, int(r.prompt_len[row]))
            count = r.owner[row].request.params.prompt_logprobs
            targets = r.tokens[row, begin + 1 : end].copy()
            found.append(PromptTargets(i, int(first[i]), targets, count))
        return tuple(found)

    # ---------------------------------------------------------------- results
    def update(
        self, plan: Plan, result: StepResult, prompt_scores: dict[int, Logprobs] | None = None
    ) -> list[Event]:
        """Takes in a fetched step: tokens, ends. Arrays may be padded."""
        r, n = self.rows, len(plan.rows)
        tokens, fault = result.tokens[:n, 0].astype(np.int64), result.fault[:n] > 0
        live = r.active[plan.rows] & (r.epoch[plan.rows] == plan.epochs)
        r.computed[plan.rows[live]] += plan.query_len[live]
        events = self._take_prompt_scores(plan, live, prompt_scores) if prompt_scores else []

        drawn = live & plan.draws
        got = plan.rows[drawn]
        own = tokens[drawn]
        r.pending[got] -= 1
        r.tokens[got, r.known[got]] = own
        r.known[got] += 1
        stopped = (own[:, None] == r.stop_ids[got]).any(1) & (r.known[got] >= r.min_len[got])
        full = r.known[got] >= r.end[got]
        bad = fault[drawn]
        events += self._events(plan, drawn, own, result.logprobs, bad)
        self.stats.num_drawn_tokens += len(got)

        ended = np.flatnonzero(stopped | full | bad)
        if len(ended):
            self._register(got[ended[~bad[ended]]])  # no further plan does it
        for i in ended.tolist():
            row, token = int(got[i]), int(own[i])
            self._end(row, token, bool(bad[i]), bool(stopped[i]))
        for i in np.flatnonzero(~live & plan.draws).tolist():
            events += self._take_orphan(plan, i, int(tokens[i]), bool(fault[i]), result.logprobs)
        return events

    def _events(
        self,
        plan: Plan,
        drawn: HostArray,
        tokens: HostArray,
        logprobs: Logprobs | None,
        bad: HostArray,
    ) -> list[Event]:
        owners = plan.owners[drawn].tolist()
        if logprobs is None and not bad.any():
            return [Event(s, t) for s, t in zip(owners, tokens.tolist(), strict=True)]
        places = np.flatnonzero(drawn).tolist()
        return [
            Event(s, None if b else t, s.own_logprobs(logprobs, i))
            for s, t, i, b in zip(owners, tokens.tolist(), places, bad.tolist(), strict=True)
        ]

    def _take_prompt_scores(
        self, plan: Plan, live: HostArray, prompt_scores: dict[int, Logprobs]
    ) -> list[Event]:
        events = []
        for i, scores in prompt_scores.items():
            sequence: Sequence = plan.owners[i]
            request, start = sequence.request, int(plan.start[i]) + 1
            fresh = request.num_prompt_scored + 1 - start  # computed anew after a preemption
            count = len(scores.rank)
            if sequence.is_finished or fresh >= count or fresh < 0:
                continue
            request.num_prompt_scored += count - fresh
            part = Logprobs(scores.ids[fresh:], scores.values[fresh:], scores.rank[fresh:])
            events.append(Event(sequence, None, prompt_scores=(start + fresh, part)))
        return events

    def _register(self, rows: HostArray) -> None:
        """Full blocks whose tokens are known and which a planned step computes become findable:
        whoever finds them runs in a later step. Siblings may then start."""
        r = self.rows
        complete = np.minimum(r.bound[rows], r.known[rows])
        fresh = self.kv.rows_to_register(rows, complete)
        for row in fresh[r.registers[fresh]].tolist():
            upto = min(int(r.bound[row]), int(r.known[row]))
            sequence: Sequence = r.owner[row]
            root = sequence.request.hash_root
            assert root is not None, "only rows of requests with a root register"
            self.kv.register(row, r.tokens[row, :upto], sequence.hashes, root)
        for row in rows[r.has_siblings[rows] & (r.bound[rows] >= r.prompt_len[rows])].tolist():
            r.has_siblings[row] = False
            self._start_siblings(r.owner[row])

    def _start_siblings(self, sequence: Sequence) -> None:
        """Lets the other sequences of the request wait for rows, once."""
        if not sequence.is_prompt_done:
            sequence.is_prompt_done = True
            if sequence.index == 0:
                for sibling in sequence.request.sequences[1:]:
                    if not sibling.is_finished:
                        self.waiting.push(sibling)

    def _end(self, row: int, token: int, bad: bool, stopped: bool) -> None:
        sequence: Sequence = self.rows.owner[row]
        if bad:
            self.rows.known[row] -= 1  # what was drawn from NaN is no token
            self._take_fault(sequence)
        elif stopped:
            self.finish(sequence, "stop", sequence.name_of_stop(token))
        else:
            self.finish(sequence, "length")

    def _take_fault(self, sequence: Sequence) -> None:
        """It drew from NaN. That may come from blocks that it shared, so it is computed anew
        without any before it fails."""
        self.kv.forget(sequence.hashes)
        if not sequence.has_shared:
            sequence.error = "the model gave logits that are not finite; the request was ended"
            self.finish(sequence, "error")
            return
        sequence.is_apart = True
        if sequence.row >= 0:
            self.rows.pending[sequence.row] = 0  # further draws follow from NaN as well
            self._preempt(sequence.row)
        else:
            sequence.num_in_flight = 0
            self.waiting.push(sequence)

    def _take_orphan(
        self, plan: Plan, i: int, token: int, bad: bool, logprobs: Logprobs | None
    ) -> list[Event]:
        """A draw whose row was given away: preempted sequences keep it, ended ones drop it, and so
        do those that are computed anew because of NaN."""
        sequence: Sequence = plan.owners[i]
        if bad:
            self.kv.forget(sequence.hashes)
        is_void = sequence.epoch != plan.epochs[i] or not sequence.num_in_flight
        if sequence.is_finished or is_void:
            return []
        sequence.num_in_flight -= 1
        request = sequence.request
        if bad:
            sequence.num_in_flight = 0
            self._take_fault(sequence)
            return [Event(sequence, None)]
        sequence.saved.append(token)
        self.stats.num_drawn_tokens += 1
        event = Event(sequence, token, sequence.own_logprobs(logprobs, i))
        length = len(request.prompt) + len(sequence.saved)
        enough = len(sequence.saved) >= request.params.min_tokens
        if token in request.stop_ids and enough:
            self.finish(sequence, "stop", sequence.name_of_stop(token))
        elif length >= request.end:
            self.finish(sequence, "length")
        elif not sequence.num_in_flight:
            self.waiting.push(sequence)
        return [event]

    def restart(self) -> None:
        """The device lost its cache and every step in flight: all running sequences are computed
        anew."""
        r = self.rows
        for row in np.flatnonzero(r.active).tolist():
            r.pending[row] = 0
            self._preempt(row)
        self.kv.forget_all()
        self.kv.take_changes()
        for request in self.requests.values():
            for sequence in request.sequences:
                if sequence.num_in_flight and not sequence.is_finished:
                    sequence.num_in_flight = 0
                    self.waiting.push(sequence)
