"""Cases: compiled programs, replayed with other data, run ahead of the host, in order.

What breaks graph capture and asynchronous runtimes: something of the first call that was kept,
padding that writes, a buffer that is reused while somebody still reads it.

Knows: values that cross programs, an exact model (programs_echo). Does not know: kernels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases import programs_traffic, programs_values
from vllm_core_conformance.cases.programs_echo import (
    LARGE,
    LIVE_ROWS,
    POSITIONS,
    ROWS,
    SMALL,
    VOCAB,
    Echo,
    Weights,
)
from vllm_core_conformance.cases.programs_session import Pending, Session
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling

Body = Callable[[Target, np.random.Generator], Evidence]


def replay_data(target: Target, rng: np.random.Generator) -> Evidence:
    """One bucket, ten steps: requests come and go, rows and blocks are used again, chunks stop
    anywhere."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    for number in range(10):
        work = _random_work(session, rng)
        pending = session.submit(work, weights)
        evidence += session.check(pending)
        evidence += session.check_state(f" after step {number}")
        for row in [r for r, s in session.sequences.items() if s.computed > 20]:
            session.finish(row)
    evidence += session.check_cache(weights)
    return evidence


def _random_work(session: Session, rng: np.random.Generator) -> list[tuple[int, int]]:
    """1 to ROWS rows whose tokens fit the small bucket; idle rows may get a new request."""
    count, left, work = int(rng.integers(1, ROWS + 1)), SMALL, []
    for row in (int(r) for r in rng.permutation(LIVE_ROWS)[:count]):
        if left == 0:
            break
        if row not in session.sequences:
            session.admit(row, int(rng.integers(1, 14)))
        request = session.sequences[row]
        rest = len(request.tokens) - request.computed
        work.append((row, int(rng.integers(1, min(rest, left) + 1))))
        left -= work[-1][1]
    return work


def replay_lengths(target: Target, rng: np.random.Generator) -> Evidence:
    """Decoding rows of one bucket whose lengths jump up and down between calls."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    lengths = rng.permutation([2, 9, 24, POSITIONS - 16])
    rows = [int(r) for r in rng.permutation(LIVE_ROWS)[: len(lengths)]]
    for row, length in zip(rows, lengths, strict=True):
        session.admit(row, int(length))
        evidence += session.check(session.submit([(row, int(length))], weights, LARGE))
    for _ in range(3):
        for some in ([rows[0]], [rows[2], rows[1]], [rows[3]], rows[::-1], [rows[1]]):
            evidence += session.check(session.submit([(r, 1) for r in some], weights))
    evidence += session.check_state()
    return evidence


def replay_params(target: Target, rng: np.random.Generator) -> Evidence:
    """The same executable with one set of weights, another, and the first again."""
    models = [Weights.make(target, rng) for _ in range(2)]
    sessions = [Session(target, rng) for _ in models]
    evidence = Evidence()
    for session in sessions:
        session.rivals = models
        session.admit(1, 6)
        session.admit(5, 2)
    work = [[(1, 6), (5, 2)]] + [[(5, 1), (1, 1)]] * 4
    for number, rows in enumerate(work):
        for which in (0, 1) if number % 2 else (1, 0):
            pending = sessions[which].submit(rows, models[which])
            evidence += sessions[which].check(pending, when=f" of weights {'AB'[which]}")
    return evidence


def two_sessions(target: Target, rng: np.random.Generator) -> Evidence:
    """One executable over two states and caches in turn, nothing fetched before the end."""
    weights = Weights.make(target, rng)
    sessions = [Session(target, rng) for _ in range(2)]
    pending: list[tuple[Session, Pending]] = []
    for which, session in enumerate(sessions):
        for row in (0, 3, 5 - which):
            session.admit(row, int(rng.integers(1, 4)))
    for number in range(6):
        for session in sessions if number % 2 else sessions[::-1]:
            work = [
                (row, max(1, len(s.tokens) - s.computed)) for row, s in session.sequences.items()
            ]
            if sum(count for _, count in work) > SMALL:
                work = work[:2]
            pending.append((session, session.submit(work, weights)))
    evidence = Evidence()
    for session, step in pending:
        evidence += session.check(step, when=f" of session {sessions.index(session)}")
    for which, session in enumerate(sessions):
        evidence += session.check_state(f" of session {which}")
        evidence += session.check_cache(weights, f" of session {which}")
    return evidence


def padding_writes_nothing(target: Target, rng: np.random.Generator) -> Evidence:
    """A full batch, then one row in the same bucket: every other row and slot keeps its bits."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    rows = [int(r) for r in rng.permutation(LIVE_ROWS)[:ROWS]]
    for row in rows:
        session.admit(row, int(rng.integers(8, 13)))
    for row in rows:
        evidence += session.check(session.submit([(row, SMALL)], weights))
    for row in rows:
        rest = len(session.sequences[row].tokens) - SMALL
        if rest:
            evidence += session.check(session.submit([(row, rest)], weights))
    evidence += session.check(session.submit([(row, 1) for row in rows], weights))
    for row in (rows[2], rows[0], rows[2]):
        session.scramble()
        before = session.read_cache()
        evidence += session.check(
            session.submit([(row, 1)], weights), when=", one row of the bucket"
        )
        request, after = session.sequences[row], session.read_cache()
        at = request.computed - 1
        block, slot = (
            request.blocks[at // session.echo.block_tokens],
            at % session.echo.block_tokens,
        )
        for name in ("k", "v"):
            before[name][block, slot] = after[name][block, slot]
            evidence += require_equal(
                after[name],
                before[name],
                f"{name.upper()} cache, all slots but the one token of row {row}, after a step of "
                "one row in a larger bucket (padding must write nowhere but block 0)",
                axes=("block", "slot", "lane"),
                nan_equal=True,
            )
        evidence += session.check_state(" after a step of one row in a larger bucket")
    evidence += session.check(session.submit([(row, 1) for row in rows[::-1]], weights))
    evidence += session.check_cache(weights)
    return evidence


def keys_share_a_state(target: Target, rng: np.random.Generator) -> Evidence:
    """Prompts, chunks and single tokens, each step in the smallest bucket there is: one state."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    steps: list[Pending] = []
    one, two, three = (int(r) for r in rng.permutation(LIVE_ROWS)[:3])

    def submit(*work: tuple[int, int]) -> None:
        count = sum(tokens for _, tokens in work)
        steps.append(session.submit(work, weights, count, len(work)))

    session.admit(one, 20)
    session.admit(two, 11)
    submit((one, 20))
    submit((one, 1), (two, 4))
    submit((one, 1), (two, 7))
    submit((two, 1), (one, 1))
    session.finish(one)
    session.admit(one, 3)
    session.admit(three, 25)
    submit((three, 25), (one, 3))
    submit((two, 1), (one, 1), (three, 1))
    for step in steps:
        evidence += session.check(step)
    evidence += session.check_state()
    evidence += session.check_cache(weights)
    return evidence


def order_of_effects(target: Target, rng: np.random.Generator) -> Evidence:
    """set_bias and apply between submitted steps change the later steps and no earlier one."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    size = session.echo.block_tokens
    length = min(2 * size + 1, POSITIONS - 16)
    biased, plain, moved = (int(r) for r in rng.permutation(LIVE_ROWS)[:3])
    session.admit(biased, 3, bias_slot=1)
    session.admit(plain, length)
    session.admit(moved, length)
    steps = [session.submit([(row, length)], weights, LARGE) for row in (plain, moved)]
    steps.append(session.submit([(biased, 3)], weights))
    rows = [(biased, 1), (plain, 1), (moved, 1)]
    columns = list(range(length // size))
    for token in (int(t) for t in rng.choice(VOCAB, 2, replace=False)):
        session.force(1, token)
        steps.append(session.submit(rows, weights))
        session.move_cells(moved, plain, columns)
        steps.append(session.submit(rows[::-1], weights))
        session.move_cells(moved, moved, columns)
        own = session.sequences[moved]
        own.context[: len(columns) * size] = own.tokens[: len(columns) * size]
        steps.append(session.submit(rows, weights))
    for step in steps:
        evidence += session.check(step, when=" (submitted with others, fetched at the end)")
    evidence += session.check_state()
    return evidence


def ahead_results(target: Target, rng: np.random.Generator) -> Evidence:
    """Seven steps ahead of the host; fetches started early and late, waited out of order, twice."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    rows = [int(r) for r in rng.permutation(LIVE_ROWS)[:ROWS]]
    for row in rows:
        session.admit(row, 2)
    steps = [session.submit([(row, 2) for row in rows], weights)]
    started = {}
    for number in range(1, 7):
        if number % 2:  # on its way while the next steps run
            with calling("fetch"):
                started[number - 1] = target.runtime.fetch(steps[-1].result)
        work = [(row, 1) for row in (rows if number % 2 else rows[::-1])]
        steps.append(session.submit(work, weights))
    for number in sorted(started, reverse=True):
        for time in ("", ", waited for again"):
            with calling("wait of a fetch"):
                result = started[number].wait()
            when = f" (fetched at once, waited for {len(steps) - 1 - number} steps later{time})"
            evidence += session.check(steps[number], result, when)
    for step in [*steps[::-1], *steps]:
        later = len(steps) - 1 - step.number
        evidence += session.check(step, when=f" (fetched after {later} later steps)")
    evidence += session.check_state()
    return evidence


def ahead_hidden(target: Target, rng: np.random.Generator) -> Evidence:
    """The hidden states of a step are scored after later steps of the same bucket have run."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    first, second = (int(r) for r in rng.permutation(LIVE_ROWS)[:2])
    session.admit(first, SMALL - 2)
    session.admit(second, 2)
    steps = [session.submit([(first, SMALL - 2), (second, 2)], weights)]
    for _ in range(4):
        steps.append(session.submit([(second, 1), (first, 1)], weights))
    for step in steps[::-1]:
        count = len(step.found)
        index = np.resize(rng.permutation(count), ROWS).astype(np.int32)
        program, array = session.echo.score(), target.array(index)
        with calling("the program score"):
            results = program(weights.params, step.hidden, array)
        (best,) = target.fetch(tuple(results))
        evidence += require_equal(
            np.asarray(best).astype(np.int64),
            weights.successor[step.found[index]],
            f"best tokens by the hidden states of step {step.number}, scored when "
            f"{len(steps) - 1 - step.number} later steps were submitted",
            axes=("place",),
        )
        evidence += session.check(step)
        evidence += session.check_padding(step, " of one bucket")
    return evidence


def upload_copies(target: Target, rng: np.random.Generator) -> Evidence:
    """Two steps packed into one array, one after the other, before either has run."""
    weights, evidence = Weights.make(target, rng), Evidence()
    sessions = [Session(target, rng) for _ in range(2)]
    layout = sessions[0].echo.layout(SMALL)
    shared = np.array(layout.template())
    waiting = []
    for session in sessions:
        most = min(SMALL, target.constraints().max_tokens or SMALL)
        session.admit(int(rng.integers(LIVE_ROWS)), int(rng.integers(min(2, most - 1), most)))
        work = [(row, len(s.tokens)) for row, s in session.sequences.items()]
        buffer, host, ordered = session.pack(work, layout)
        shared[:] = buffer
        with calling("upload"):
            device_step = target.runtime.upload(shared, host, layout.key)
        waiting.append((session, ordered, device_step))
    shared[:] = -1
    steps = [(s, s.run(work, step, weights, layout)) for s, work, step in waiting]
    for which, (session, pending) in enumerate(steps):
        when = f" of session {which} (both steps were uploaded from one array before either ran)"
        evidence += session.check(pending, when=when)
        evidence += session.check_state(when)
        evidence += session.check_cache(weights, when)
    return evidence


def inputs_of_a_step(target: Target, rng: np.random.Generator) -> Evidence:
    """An uploaded step and the weights are read, not consumed: a second session replays them."""
    weights, evidence = Weights.make(target, rng), Evidence()
    seed = int(rng.integers(2**31))
    twins = [Session(target, np.random.default_rng(seed)) for _ in range(2)]
    layout = Echo.of(target).layout(SMALL)
    for twin in twins:
        twin.admit(2, 5)
        twin.admit(0, 3)
    wishes = ([(2, 5), (0, 3)], [(0, 1), (2, 1)], [(2, 1)])
    for work in (part for wish in wishes for part in twins[0].parts(wish)):
        packed = [twin.pack(work, layout) for twin in twins]
        buffer, host, _ = packed[0]
        other = np.array(buffer)
        layout.views(other)["token_ids"][:] = 0
        device_step = twins[0].upload(buffer, host, layout)
        twins[1].upload(other, host, layout)  # another must not replace it
        for which, twin in enumerate(twins):
            pending = twin.run(packed[which][2], device_step, weights, layout)
            evidence += twin.check(pending, when=f" of twin {which}, from the same uploaded step")
    for name, param in weights.params.items():
        with calling(f"unload of {name}"):
            found = target.runtime.unload(param)
        evidence += require_equal(
            np.asarray(found["weight"], np.float64),
            weights.host[name],
            f"weight {name!r} after six steps that only read it",
            axes=("row", "column"),
        )
    return evidence


def compiles_once(target: Target, rng: np.random.Generator) -> Evidence:
    """After a bucket's first call, other data of the same shapes cost no compilation."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    session.admit(1, 4)
    session.admit(4, 3)
    session.force(0, 5)
    evidence += session.check(session.submit([(1, 4), (4, 3)], weights))
    evidence += session.check(session.submit([(1, 1)], weights))
    before = target.runtime.num_compilations()
    for work in ([(4, 1)], [(4, 1), (1, 1)], [(1, 1)]):
        session.force(1, int(rng.integers(VOCAB)))
        evidence += session.check(session.submit(work, weights))
    after = target.runtime.num_compilations()
    what = "num_compilations"
    evidence += require_equal(
        np.array(after), np.array(before), f"{what} after three more steps of one bucket"
    )
    evidence += programs_traffic.require_counted(target, after)
    if not target.is_static:
        evidence += require_equal(np.array(after), np.array(0), f"{what} without static shapes")
    return evidence


def _case(name: str, says: str, body: Body, *profiles: str) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return body(target, np.random.default_rng([seed, zlib.crc32(f"programs.{name}".encode())]))

    return Case(f"programs.{name}", says, run, frozenset(("core", *profiles)))


CASES: tuple[Case, ...] = (
    _case(
        "replay.data",
        "one executable computes each call from that call's tokens, lengths, tables and rows",
        replay_data,
        "smoke",
    ),
    _case(
        "replay.lengths",
        "one executable follows lengths that grow and shrink from call to call",
        replay_lengths,
    ),
    _case(
        "replay.params",
        "parameters are arguments: the same executable computes with whichever it is given",
        replay_params,
        "smoke",
    ),
    _case(
        "replay.two_sessions",
        "state and cache are arguments: two pairs take turns in one executable",
        two_sessions,
        "smoke",
    ),
    _case(
        "padding.writes_nothing",
        "a smaller batch in a larger bucket leaves all other rows and slots as they were",
        padding_writes_nothing,
        "smoke",
    ),
    _case(
        "keys.share_a_state",
        "executables of different buckets work on one state and cache",
        keys_share_a_state,
    ),
    _case(
        "order.effects",
        "programs take effect in the order of their calls, also when nothing is waited for",
        order_of_effects,
        "smoke",
    ),
    _case(
        "ahead.results",
        "results stay as they were while later steps run, whenever and however often fetched",
        ahead_results,
        "smoke",
    ),
    _case(
        "ahead.hidden",
        "a device value among the results feeds a later program after further steps",
        ahead_hidden,
    ),
    _case(
        "upload.copies",
        "upload copies the packed step: the array may be reused on return",
        upload_copies,
        "smoke",
    ),
    _case(
        "inputs.of_a_step",
        "what a program does not consume (weights, the uploaded step) it does not change",
        inputs_of_a_step,
    ),
    _case(
        "compilations.once_per_bucket",
        "a bucket is compiled once, and num_compilations tells",
        compiles_once,
    ),
    *(_case(*entry) for entry in programs_values.ENTRIES),
    _case(
        "traffic",
        "sessions, buckets, early uploads, late fetches and failures in any order: each its own",
        programs_traffic.traffic,
    ),
)
