"""Facts of the live rows as arrays, so that scheduling a decode step is a few vectorised lines.

Knows: lengths, limits, stop ids, what each row needs. Does not know: blocks, order, devices.
"""

from __future__ import annotations

import numpy as np

from vllm_core.engine.request import GREEDY_BELOW, Sequence


class Rows:
    """N rows. For a live row:

    known     tokens that the host has seen (prompt and output)
    computed  tokens whose KV is in the cache, as of the last fetched step
    bound     the same with every submitted step
    goal      tokens to compute before it decodes (its length at admission)
    pending   draws submitted and not yet fetched
    end       length at which it stops
    """

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        def zeros() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            return np.zeros(num_rows, np.int64)

        def flags() -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
            return np.zeros(num_rows, bool)

        self.num_rows = num_rows
        self.owner = np.full(num_rows, None, object)
        self.tokens = np.zeros((num_rows, max_tokens), np.int32)
        self.known, self.computed, self.bound, self.goal = zeros(), zeros(), zeros(), zeros()
        self.pending, self.end, self.epoch, self.rank = zeros(), zeros(), zeros(), zeros()
        self.prompt_len, self.min_len = zeros(), zeros()
        self.active, self.paused, self.registers = flags(), flags(), flags()
        self.draw, self.filters, self.penalties, self.bias = flags(), flags(), flags(), flags()
        self.scores_prompt, self.has_siblings = flags(), flags()
        self.logprobs = np.full(num_rows, -1, np.int64)
        self.stop_ids = np.full((num_rows, 4), -1, np.int64)
        self.history_slot, self.bias_slot = zeros(), zeros()
        self.free = list(range(num_rows - 1, -1, -1))
        self._num_admitted = 0

    def admit(
        self,
        sequence: Sequence,
        tokens: np.ndarray[tuple[int], np.dtype[np.int32]],
        hit: int,
        rank: int,
    ) -> int:
        """Puts a sequence on the free row that `free` ends with."""
        row = self.free.pop()
        request, p = sequence.request, sequence.request.params
        self._num_admitted += 1
        sequence.row = row
        self.owner[row], self.active[row], self.paused[row] = sequence, True, False
        self.epoch[row], self.rank[row] = self._num_admitted, rank
        self.known[row] = self.goal[row] = len(tokens)
        self.tokens[row, : len(tokens)] = tokens
        self.computed[row] = self.bound[row] = hit
        self.pending[row], self.end[row] = 0, request.end
        self.prompt_len[row] = len(request.prompt)
        self.min_len[row] = min(len(request.prompt) + p.min_tokens, request.end)
        self.registers[row] = request.hash_root is not None
        self.draw[row] = p.temperature >= GREEDY_BELOW
        self.filters[row] = bool(self.draw[row]) and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self.penalties[row] = p.needs_history
        self.bias[row] = p.needs_bias or p.min_tokens > 0
        self.logprobs[row] = -1 if p.logprobs is None else p.logprobs
        self.scores_prompt[row] = sequence.index == 0 and request.needs_prompt_scores
        self.has_siblings[row] = p.n > 1 and not sequence.is_prompt_done
        self._set_stop_ids(row, request.stop_ids)
        return row

    def _set_stop_ids(self, row: int, ids: list[int]) -> None:
        if len(ids) > self.stop_ids.shape[1]:
            wide = np.full((self.num_rows, len(ids)), -1, np.int64)
            wide[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wide
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(ids)] = ids

    def release(self, row: int) -> None:
        self.owner[row].row = -1
        self.owner[row], self.active[row] = None, False
        self.free.append(row)

    def output(self, row: int) -> list[int]:
        """Tokens drawn so far."""
        tokens: list[int] = self.tokens[row, self.prompt_len[row] : self.known[row]].tolist()
        return tokens
