"""Draws tokens from logits in integers: one text for every framework, the same token on the same
logit bits.

One exp per logit is rounded to w = round(exp(z - max) * 2^27); from there every sum is exact, so
segments, shards, threads and frameworks cannot disagree. JAX and some devices have no 64-bit
integers, so a sum ("mass") is a pair of words (high, low 14 bits). The uniform of a draw is word 0
of Philox4x32-10 (Salmon et al., SC11): key = the request's seed, counter = (position of the drawn
token, sequence index, stream, 0), so that no generator holds a state.

Knows: bias, penalties, temperature, filters, the draw, log-probabilities. Does not know: models,
steps, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from vllm_core.errors import NotSupported
from vllm_core.ops.arrays import Array
from vllm_core.ops.step import Column, Features, Logprobs

if TYPE_CHECKING:
    from vllm_core.ops.interface import Ops

LOW = 14
SEGMENT = 64
UNIT = 27
"""w has 27 bits, so that the mass of 2^19 - 1 tokens fits a pair of words."""
SHARE = 24
"""top_p is taken as a share in 24 bits: exact in float32."""
MAX_VOCAB = (1 << 19) - 1
SMALLEST_NORMAL = 2.0**-126
"""float32: what lies below it a device may take for 0, in temperatures and in logits."""

Mass: TypeAlias = tuple[Array, Array]

_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)


def sample(
    ops: Ops,
    logits: Array,
    params: Array,
    positions: Array,
    history: Array,
    bias: Array,
    features: Features,
) -> tuple[Array, Array]:
    """One token per row. Order: bias and bans, penalties, temperature, top-k, top-p, min-p, draw.

    logits [R, V] float32 or better; params [R, NUM_COLUMNS] int32; positions [R] int32 of the token
    being drawn; history [P+1, L] int32; bias [B+1, V] float32 -> tokens [R] int32, fault [R] int32
    (NaN, or nothing finite). Filters order by (float32 logit after bias and penalties descending,
    id ascending).
    """
    xp = ops.xp
    check_vocab(logits.shape[-1])
    x = adjusted(ops, logits, params, positions, history, bias, features)
    best = ops.amax(x)
    fault = ops.cast(~xp.isfinite(best), "int32")
    greedy = ops.cast(xp.argmax(x, -1), "int32")
    if not features.draw:
        return greedy, fault

    size = -(-x.shape[-1] // SEGMENT) * SEGMENT - x.shape[-1]
    if size:  # whole segments; the padding has no mass and comes last in every order
        x = xp.concatenate((x, ops.full((x.shape[0], size), float("-inf"), "float32")), -1)
    # what a device may flush to 0 is 0, of either sign, so that order and weights agree everywhere
    x, best = (xp.where((v < SMALLEST_NORMAL) & (v > -SMALLEST_NORMAL), 0.0, v) for v in (x, best))
    temperature = ops.floats(params[:, int(Column.TEMPERATURE)])
    is_drawn = temperature >= SMALLEST_NORMAL
    # by the reciprocal, since compilers divide by a broadcast that way, and 0 where they may flush
    # it
    inverse_temperature = 1.0 / xp.where(is_drawn, temperature, 1.0)
    inverse_temperature = xp.where(inverse_temperature >= SMALLEST_NORMAL, inverse_temperature, 0.0)
    # the difference first: logits over a tiny temperature would overflow, their differences may
    below = (best[:, None] - x) * inverse_temperature[:, None]
    below = xp.where(below >= 0, below, float("inf"))  # a row of NaN stays harmless
    w = ops.words(xp.round(xp.exp(-below) * 2.0**UNIT))
    if features.filters:
        w = _filtered(ops, x, below, w, params)
    place = ops.words(positions)
    target_stream = xp.zeros_like(place)
    u = philox(
        ops,
        (place, ops.words(params[:, int(Column.SEQUENCE_INDEX)]), target_stream, target_stream),
        (ops.words(params[:, int(Column.SEED_LOW)]), ops.words(params[:, int(Column.SEED_HIGH)])),
    )
    target, _ = scaled(ops, u, mass(ops, w))
    return xp.where(is_drawn, first_above(ops, w, target), greedy), fault


def check_vocab(size: int) -> None:
    """NotSupported for a vocabulary beyond the exact sums."""
    if size > MAX_VOCAB:
        raise NotSupported(
            f"the sampler's exact sums hold {MAX_VOCAB} tokens, but the vocabulary has {size}"
        )


def adjusted(
    ops: Ops,
    logits: Array,
    params: Array,
    positions: Array,
    history: Array,
    bias: Array,
    features: Features,
) -> Array:
    """The float32 logits [R, V] that rows draw from: with bias, bans and penalties. Arguments: as
    `sample`. Public, since tests hold a kernel that does the same to it."""
    x = ops.cast(logits, "float32")
    if features.bias:
        x = _biased(ops, x, params, positions, bias)
    if features.penalties:
        x = _penalized(ops, x, params, positions, history)
    return x


def logprobs(ops: Ops, logits: Array, targets: Array, count: int) -> Logprobs:
    """Natural-log probabilities of raw logits [R, V] for targets [R] and the `count` most likely
    tokens."""
    xp = ops.xp
    x = ops.cast(logits, "float32")
    best = ops.amax(x)[:, None]
    lse = xp.log(xp.sum(xp.exp(x - best), -1))[:, None] + best
    rows = ops.arange(x.shape[0])
    targets = xp.clip(targets, 0, x.shape[-1] - 1)
    own = x[rows, targets][:, None]
    rank = ops.cast(xp.sum(ops.cast(x > own, "int32"), -1), "int32") + 1
    ids, values = targets[:, None], own - lse
    if count:
        top_values, top_ids = ops.top(x, count)
        ids = xp.concatenate((ids, top_ids), -1)
        values = xp.concatenate((values, top_values - lse), -1)
    return Logprobs(ids, values, rank)


# ---------------------------------------------------------------- what is done to the logits
def _biased(ops: Ops, x: Array, params: Array, positions: Array, bias: Array) -> Array:
    """Adds the row's bias and holds back the ids that `min_tokens` forbids before HELD_UNTIL."""
    xp, size = ops.xp, x.shape[-1]
    x = x + bias[params[:, int(Column.BIAS_SLOT)]]
    held = params[:, int(Column.HELD_IDS) :]
    is_held = (positions < params[:, int(Column.HELD_UNTIL)])[:, None] & (held >= 0)
    rows = ops.arange(x.shape[0])[:, None]
    ban = ops.full((x.shape[0], size + 1), 0.0, "float32")  # the last column is scrap
    ban = ops.put(ban, (rows, xp.where(is_held & (held < size), held, size)), float("-inf"))
    return x + ban[:, :size]


def _penalized(ops: Ops, x: Array, params: Array, positions: Array, history: Array) -> Array:
    """Repetition (prompt and output), then frequency and presence (output). Rows without keep their
    bits."""
    xp, size, num_rows = ops.xp, x.shape[-1], x.shape[0]
    tokens = history[params[:, int(Column.HISTORY_SLOT)]]
    j = ops.arange(tokens.shape[1])[None]
    seen = j < positions[:, None]
    drawn = seen & (j >= params[:, int(Column.PROMPT_LEN)][:, None])
    rows = ops.arange(num_rows)[:, None]
    blank = ops.full((num_rows, size + 1), 0.0, "float32")  # the last column is scrap
    seen_at = ops.put(blank, (rows, xp.where(seen, tokens, size)), 1.0)[:, :size]
    ones = ops.full(tuple(tokens.shape), 1.0, "float32")
    blank = ops.full((num_rows, size + 1), 0.0, "float32")
    counts = ops.accumulate(blank, (rows, xp.where(drawn, tokens, size)), ones)[:, :size]

    def column(which: Column) -> Array:
        return ops.floats(params[:, int(which)])[:, None]

    # Compilers fuse a product with the sum behind it and round once. An exclusive-or with a 0 that
    # only the data knows (no prompt is shorter than nothing) stands between, so that every device
    # rounds twice.
    zero = ops.cast(params[:, int(Column.PROMPT_LEN)] < 0, "int32")[:, None]
    repetition = column(Column.REPETITION)
    product = x * xp.where(x > 0, 1.0 / repetition, repetition)
    x = xp.where(seen_at > 0, ops.floats(ops.bits(product) ^ zero), x)
    frequency = ops.floats(ops.bits(counts * column(Column.FREQUENCY)) ^ zero)
    x = xp.where(counts > 0, x - frequency - column(Column.PRESENCE), x)
    return x


def _filtered(ops: Ops, x: Array, below: Array, w: Array, params: Array) -> Array:
    """top-k, top-p, min-p on the weights w; x, below, w [R, V padded to segments]."""
    xp, vocab = ops.xp, x.shape[-1]
    top_k = params[:, int(Column.TOP_K)]
    k = ops.words(xp.where((top_k > 0) & (top_k < vocab), top_k, vocab))
    w = ops.keep_top(x, w, xp.zeros_like(w) + 1, _carry(xp.zeros_like(k), k - 1))
    share = ops.words(xp.round(ops.floats(params[:, int(Column.TOP_P)]) * 2.0**SHARE))
    share = xp.where(share > 0, share, 1)  # a smaller top_p than 2^-24 still keeps the best token
    total = mass(ops, w)
    need, exact = scaled(ops, (share & ((1 << SHARE) - 1)) << (32 - SHARE), total)
    whole = share >= (1 << SHARE)
    need = (xp.where(whole, total[0], need[0]), xp.where(whole, total[1], need[1]))
    one_less = _decrement(ops, need)
    is_exact = whole | exact  # the shortest prefix with mass >= p*W has mass > ceil(p*W) - 1
    need = (xp.where(is_exact, one_less[0], need[0]), xp.where(is_exact, one_less[1], need[1]))
    w = ops.keep_top(x, w, w, need)
    gap = ops.floats(params[:, int(Column.MIN_P_GAP)])[:, None]
    gap = xp.where(gap > SMALLEST_NORMAL, gap, SMALLEST_NORMAL)  # a distance below it may be 0
    return xp.where(below <= gap, w, xp.zeros_like(w))


def keep_top(ops: Ops, x: Array, w: Array, unit: Array, need: Mass) -> Array:
    """Zeroes all but the shortest prefix by (x descending, id ascending) whose mass of `unit`
    exceeds `need`.

    x float32 without -0.0; w, unit words; all [R, V padded to segments]. No sort: the last key is
    found bit by bit.
    """
    xp = ops.xp
    bits = ops.bits(x)
    key = ops.words(xp.where(bits < 0, ~bits, bits ^ -0x80000000))  # unsigned order = order of x
    nothing = xp.zeros_like(unit)

    def find_bit(found: tuple[Array, Array]) -> tuple[Array, Array]:
        threshold, bit = found
        trial = threshold + bit
        inside = mass(ops, xp.where(key >= trial[:, None], unit, nothing))
        return xp.where(_greater(inside, need), trial, threshold), bit >> 1

    threshold, _ = ops.repeat(32, find_bit, (xp.zeros_like(key[:, 0]), ops.word(1 << 31)))
    above, tie = key > threshold[:, None], key == threshold[:, None]
    more = mass(ops, xp.where(above, unit, nothing))
    ties = xp.where(tie, unit, nothing)
    high, low = _prefix(ops, ties)
    taken = ties & ops.word((1 << LOW) - 1)  # inclusive becomes exclusive, less what is above
    before = _carry(
        high - (ties >> LOW) + more[0][:, None] - ops.word(1),
        low + ops.word(1 << LOW) - taken + more[1][:, None],
    )
    inside_need = ~_greater(before, (need[0][:, None], need[1][:, None]))
    return xp.where(above | (tie & inside_need), w, xp.zeros_like(w))


# ---------------------------------------------------------------- exact sums in pairs of words
def _carry(high: Array, low: Array) -> Mass:
    return high + (low >> LOW), low & ((1 << LOW) - 1)


def _decrement(ops: Ops, m: Mass) -> Mass:
    """m - 1, for m above 0."""
    borrow = m[1] == 0
    xp = ops.xp
    return xp.where(borrow, m[0] - 1, m[0]), xp.where(borrow, m[1] + ((1 << LOW) - 1), m[1] - 1)


def _greater(a: Mass, b: Mass) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] > b[1]))


def _segment_mass(ops: Ops, w: Array) -> Mass:
    """[R, V] -> pairs [R, V / SEGMENT], each below 2^33."""
    segments = w.reshape(w.shape[0], -1, SEGMENT)
    high = ops.words(ops.xp.sum(segments >> LOW, -1))
    low = ops.words(ops.xp.sum(segments & ((1 << LOW) - 1), -1))
    return _carry(high, low)


def mass(ops: Ops, w: Array) -> Mass:
    """Exact sum over the last axis of w [R, V padded to segments] -> a pair [R]."""
    high, low = _segment_mass(ops, w)
    return _carry(ops.words(ops.xp.sum(high, -1)), ops.words(ops.xp.sum(low, -1)))


def _prefix(ops: Ops, w: Array) -> Mass:
    """Exact inclusive prefix sums over the last axis, in order of id."""
    own = _segment_mass(ops, w)
    high = ops.words(ops.xp.cumsum(own[0], -1)) - own[0]  # what precedes each segment
    low = ops.words(ops.xp.cumsum(own[1], -1)) - own[1]
    segments = w.reshape(w.shape[0], -1, SEGMENT)
    inner_high = ops.words(ops.xp.cumsum(segments >> LOW, -1)) + high[:, :, None]
    inner_low = ops.words(ops.xp.cumsum(segments & ((1 << LOW) - 1), -1)) + low[:, :, None]
    high, low = _carry(inner_high, inner_low)
    return high.reshape(w.shape), low.reshape(w.shape)


def first_above(ops: Ops, w: Array, target: Mass) -> Array:
    """The first id whose inclusive prefix mass exceeds the target: [R, V padded], pairs [R] -> [R]
    int32."""
    xp = ops.xp
    goal = (target[0][:, None], target[1][:, None])
    own = _segment_mass(ops, w)
    high, low = ops.words(xp.cumsum(own[0], -1)), ops.words(xp.cumsum(own[1], -1))
    rows = ops.arange(w.shape[0])
    found = ops.cast(_greater(_carry(high, low), goal), "int32")
    segment = ops.cast(xp.argmax(found, -1), "int32")
    before = (
        high[rows, segment] - own[0][rows, segment],
        low[rows, segment] - own[1][rows, segment],
    )
    inner = w.reshape(w.shape[0], -1, SEGMENT)[rows, segment]
    inner_high = ops.words(xp.cumsum(inner >> LOW, -1)) + before[0][:, None]
    inner_low = ops.words(xp.cumsum(inner & ((1 << LOW) - 1), -1)) + before[1][:, None]
    found = ops.cast(_greater(_carry(inner_high, inner_low), goal), "int32")
    return segment * SEGMENT + ops.cast(xp.argmax(found, -1), "int32")


def scaled(ops: Ops, word: Array, total: Mass) -> tuple[Mass, Array]:
    """(floor(word * total / 2^32), whether nothing was cut off): where a 32-bit fraction falls in a
    mass."""
    mask = ops.word(0xFFFFFFFF)
    h1, l1 = _multiply(word, total[0])
    h2, l2 = _multiply(word, total[1])
    a = (l1 << LOW) & mask
    rest = (a + l2) & mask
    over = ((a >> 1) + (l2 >> 1) + (a & l2 & 1)) >> 31
    return _carry(h1, h2 + (l1 >> (32 - LOW)) + over), rest == 0


def _multiply(a: Array, b: Array) -> tuple[Array, Array]:
    """32 x 32 -> (high, low) words, by 16-bit limbs: no intermediate exceeds 32 bits."""
    al, ah, bl, bh = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    ll, lh, hl = al * bl, al * bh, ah * bl
    mid = (ll >> 16) + (lh & 0xFFFF) + (hl & 0xFFFF)
    high = ah * bh + (lh >> 16) + (hl >> 16) + (mid >> 16)
    return high, (ll & 0xFFFF) | ((mid & 0xFFFF) << 16)


def philox(ops: Ops, counter: Sequence[Array], key: tuple[Array, Array]) -> Array:
    """Word 0 of Philox4x32-10 for a counter of four words and a key of two."""
    mask = ops.word(0xFFFFFFFF)
    m0, m1, w0, w1 = (ops.word(value) for value in _PHILOX)

    def one_round(words: tuple[Array, ...]) -> tuple[Array, ...]:
        c0, c1, c2, c3, k0, k1 = words
        h0, l0 = _multiply(c0, m0)
        h1, l1 = _multiply(c2, m1)
        return h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0, (k0 + w0) & mask, (k1 + w1) & mask

    return ops.repeat(10, one_round, (*counter, *key))[0]
