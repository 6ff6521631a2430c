"""Judges what an engine gave for requests, token by token, against the float64 decoder.

Under teacher forcing: the oracle reads the prompt and the very tokens that the engine gave, so that
each token and each log-probability is judged by itself. How far logits may be off follows from the
oracle walked with an honest device's rounding errors, never from the backend (T2). A token is
decided strictly where no error of that size could change it; else any token within it passes, and
is counted (T8, section 8 of the seam).

Knows: the oracle, requests, streams. Does not know: engines, devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.engine.request import Request
from vllm_core.ops import Logprobs
from vllm_core_conformance.case import Evidence, Failed, Measure, require
from vllm_core_conformance.cases.serving_draws import Choice, adjusted, choices
from vllm_core_conformance.cases.serving_engine import Served, Stream, Streams
from vllm_core_conformance.oracle import model as oracle
from vllm_core_conformance.score import CLASSES, ROUNDOFF, limits_of

Numbers = NDArray[Any]

MIN_STRICT = 0.9
"""Share of greedy tokens that must be decided strictly, in dtypes of 32 and more bits (T8). In 16
bits the band follows from the dtype alone, and the log-probabilities are what is judged."""
WALKS = 3
"""Noisy walks of the oracle for one sequence."""


@dataclass
class Known:
    """What the oracle knows of a sequence: [T, V] each, row t predicts token t + 1."""

    logits: Numbers
    logprobs: Numbers
    noise: Numbers
    """Root mean square of an honest device's error of each log-probability."""


class Judge:
    """Of all sequences of a case."""

    def __init__(self, served: Served, told: str = "") -> None:
        self.served, self.told = served, told
        self.limits = limits_of("model", served.target.dtype)
        self.band = self.limits.max * CLASSES[served.target.caps.numeric_class]
        self.z: list[Numbers] = []
        self.strict = self.loose = self.sampled = self.sampled_loose = self.checks = 0

    # ---- the oracle
    def know(self, tokens: list[int]) -> Known:
        blueprint, weights = self.served.blueprint, self.served.weights
        u = ROUNDOFF[self.served.target.dtype]
        exact = oracle.hidden(blueprint, weights, tokens)
        walks = [
            oracle.hidden(blueprint, weights, tokens, oracle.Rounding(u, walk)) - exact
            for walk in range(WALKS)
        ]
        spread = np.sqrt(np.mean(np.square(walks), axis=(0, 2)))  # [T], of a hidden value
        x = oracle.logits_of(blueprint, weights, exact)
        logprobs = oracle.log_softmax(x)
        rows = oracle.head_of(blueprint, weights) * blueprint.logit_scale
        noise = np.empty_like(x)
        for t, own in enumerate(x):
            slope = rows
            if blueprint.logit_softcap is not None:
                slope = rows * (1 - np.square(own / blueprint.logit_softcap))[:, None]
            p = np.exp(logprobs[t])
            noise[t] = spread[t] * np.linalg.norm(slope - p @ slope, axis=1)
            # beyond first order: what the normalisation could move by at the edge of the band
            reach = self.band * spread[t] * np.linalg.norm(slope - slope[own.argmax()], axis=1)
            excess = np.log(p @ np.exp(np.minimum(reach, 50.0))) - p @ reach
            noise[t] = np.hypot(noise[t], max(0.0, excess) / self.band)
        noise += oracle.U32 * (1 + np.abs(x) + np.abs(x - logprobs))
        return Known(x, logprobs, noise)

    # ---- verdicts
    def all(self, requests: Iterable[Request], streams: Streams) -> None:
        """Every sequence of requests that ran to their end."""
        for request in requests:
            for sequence in request.sequences:
                stream = streams.get((request.request_id, sequence.index), Stream())
                self.sequence(request, sequence.index, stream)

    def sequence(
        self, request: Request, index: int, stream: Stream, *, is_whole: bool = True
    ) -> None:
        """One sequence; is_whole: it was not aborted."""
        who = f"request {request.request_id!r}" + (f" sequence {index}" if index else "")
        if is_whole:
            self._ends(request, index, stream, who)
        if not stream.tokens and not stream.prompt_scores:
            return
        known = self.know([*request.prompt, *stream.tokens])
        for place in range(len(stream.prompt_scores)):
            ids, values, rank = stream.prompt_scores[place]
            self._logprobs(
                known,
                place,
                request.prompt[place + 1],
                Logprobs(ids, values, np.array(rank)),
                f"{who}, prompt token {place + 1}",
            )
        for i in range(len(stream.tokens)):
            self._token(request, index, stream, known, i, who)

    def _ends(self, request: Request, index: int, stream: Stream, who: str) -> None:
        sequence, p = request.sequences[index], request.params
        require(
            sequence.finish_reason in ("stop", "length"),
            f"{self._where()}: {who} ended as {sequence.finish_reason!r}"
            + (f": {sequence.error}" if sequence.error else "")
            + self._history(request, index, 0),
        )
        tokens = stream.tokens
        room = request.end - len(request.prompt)
        stops = [
            i + 1 for i, t in enumerate(tokens) if t in request.stop_ids and i + 1 >= p.min_tokens
        ]
        expected = min([*stops, room])
        require(
            len(tokens) == expected,
            f"{self._where()}: {who} ended after {len(tokens)} tokens, expected {expected}",
        )
        asked = p.prompt_logprobs is not None and index == 0
        want = len(request.prompt) - 1 if asked else 0
        require(
            len(stream.prompt_scores) == want,
            f"{self._where()}: {who} has log-probabilities of {len(stream.prompt_scores)} prompt "
            f"tokens, expected {want}",
        )
        require(
            len(stream.logprobs) == (0 if p.logprobs is None else len(tokens)),
            f"{self._where()}: {who} has log-probabilities of {len(stream.logprobs)} of its "
            f"{len(tokens)} tokens",
        )
        self.checks += 4

    def _token(
        self, request: Request, index: int, stream: Stream, known: Known, i: int, who: str
    ) -> None:
        token, row = stream.tokens[i], len(request.prompt) + i - 1
        if i < len(stream.logprobs):
            self._logprobs(
                known,
                row,
                token,
                stream.logprobs[i],
                f"{who}, token {i} of its output",
                self._history(request, index, row + 1),
            )
        so_far = stream.tokens[:i]
        x, grows = adjusted(known.logits[row], request, so_far)
        found = choices(x, known.noise[row] * self.band * grows, request, index, row + 1)
        self.checks += 1
        if token not in found.tokens:
            raise self._wrong(request, index, found, known, i, token, who)
        if request.params.is_greedy:
            self.strict += found.is_strict
            self.loose += not found.is_strict
        else:
            self.sampled += found.is_strict
            self.sampled_loose += not found.is_strict

    def _wrong(
        self,
        request: Request,
        index: int,
        found: Choice,
        known: Known,
        i: int,
        token: int,
        who: str,
    ) -> Failed:
        position = len(request.prompt) + i
        row = known.logits[position - 1]
        how = "drew" if not request.params.is_greedy else "took"
        got = f"{token} (logit {row[token]:.4g})" if 0 <= token < len(row) else f"{token}"
        return Failed(
            f"{self._where()}: {who} {how} token {got} at position {position}, expected "
            f"{found.expected} (logit {row[found.expected]:.4g}); the {i} tokens before it are "
            f"right{self._history(request, index, position)}",
            request=request.request_id,
            position=position,
            got=int(token),
            expected=int(found.expected),
            prompt=list(request.prompt),
        )

    def _logprobs(
        self, known: Known, row: int, token: int, told: Logprobs, what: str, history: str = ""
    ) -> None:
        """ids, values and rank that were reported for the token behind `row`."""
        ids, values = np.asarray(told.ids), np.asarray(told.values, np.float64)
        x, exact = known.logits[row], known.logprobs[row]
        require(
            bool((ids >= 0).all() and (ids < len(x)).all()) and int(ids[0]) == token,
            f"{self._where()}: {what}: log-probabilities are reported for ids {ids.tolist()}, "
            f"but the token is {token}",
        )
        noise = known.noise[row]
        with np.errstate(invalid="ignore"):
            z = np.abs(values - exact[ids]) / noise[ids]
        z = np.where(np.isnan(z), np.inf, z)
        self.z.append(z)
        if not z.max() <= self.band:
            worst = int(z.argmax())
            raise Failed(
                f"{self._where()}: {what}: log-probability of id {ids[worst]} is "
                f"{values[worst]:.6g}, expected {exact[ids[worst]]:.6g} ({z[worst]:.3g} times the "
                f"noise of an honest device; allowed {self.band:.3g}){history}",
                worst=float(z[worst]),
            )
        slack = noise * self.band
        own = x[token]
        low = 1 + int((x - slack > own + slack[token]).sum())
        high = 1 + int((x + slack > own - slack[token]).sum()) - 1
        require(
            low <= int(told.rank) <= max(low, high),
            f"{self._where()}: {what}: its rank is {int(told.rank)}, expected {low}"
            + (f" to {high}" if high > low else ""),
        )
        top = ids[1:]
        if len(top):
            least = np.sort(x)[-len(top)]
            weak = [int(v) for v in top if x[v] + 2 * slack[v] < least]
            require(
                not weak and len(set(top.tolist())) == len(top),
                f"{self._where()}: {what}: {top.tolist()} are not its {len(top)} likeliest tokens",
            )
        self.checks += len(ids) + 2

    # ---- words
    def _where(self) -> str:
        name = self.served.blueprint.name
        return f"model {name!r}, {self.told}" if self.told else f"model {name!r}"

    def _history(self, request: Request, index: int, position: int) -> str:
        """What befell the sequence: where a fault is to be looked for."""
        sequence, size = request.sequences[index], self.served.block_tokens
        told = []
        if position:
            told.append(f"its slot is block column {position // size} slot {position % size}")
        if sequence.num_hit_tokens:
            told.append(f"{sequence.num_hit_tokens} prompt tokens came from the prefix cache")
        if sequence.num_preemptions:
            told.append(f"it was preempted {sequence.num_preemptions} times")
        return "".join(f"; {text}" for text in told)

    # ---- evidence
    def evidence(self) -> Evidence:
        """Of all that was judged. Failed where the errors are small but everywhere."""
        found = Evidence(checks=self.checks)
        total = self.strict + self.loose
        if self.z:
            z = np.concatenate(self.z)
            rms = float(np.sqrt(np.mean(np.square(z))))
            measure = Measure(
                "model", rms, float(z.max()), len(z), self.limits.rms, self.limits.max
            )
            found.measures.append(measure)
            allowed = self.limits.rms * CLASSES[self.served.target.caps.numeric_class]
            require(
                rms <= allowed,
                f"{self._where()}: log-probabilities are off by {rms:.3g} times an honest "
                f"device's noise in the mean over {len(z)} of them (allowed {allowed:.3g})",
            )
        found.figures = {
            "greedy tokens decided strictly": float(self.strict),
            "greedy tokens within the noise": float(self.loose),
            "sampled tokens decided strictly": float(self.sampled),
            "sampled tokens within the noise": float(self.sampled_loose),
        }
        target = self.served.target
        wide = ROUNDOFF[target.dtype] <= ROUNDOFF["float32"] and target.caps.numeric_class == "A"
        if wide and total >= 20 and self.strict < MIN_STRICT * total:
            raise Failed(
                f"{self._where()}: only {self.strict} of {total} greedy tokens could be decided "
                "strictly"
            )
        return found
