from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_core.bindings.numpy import NumpyOps
from vllm_core.ops import Param, sampling

torch = pytest.importorskip("torch", reason="the ops of the torch binding were not checked")
from vllm_core.bindings.torch import TorchOps, packing  # noqa: E402

Host = np.ndarray[Any, Any]
NUMPY, TORCH = NumpyOps(), TorchOps(torch.device("cpu"))
ASYNCHRONOUS = TorchOps(torch.device("cpu"))
ASYNCHRONOUS.host_reads_are_free = False  # the way of devices that must not be waited for

ROWS, VOCAB, PADDED = 6, 3000, 3008  # whole segments of 64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights_of(z: Host) -> Host:
    below = z.max(-1, keepdims=True) - z
    w: Host = NUMPY.words(np.round(np.exp(-below) * 2.0**sampling.UNIT))
    return w


def logits(kind: str) -> Host:
    z: Host = np.random.default_rng(5).standard_normal((ROWS, PADDED)).astype(np.float32)
    z[:, VOCAB:] = -np.inf
    if kind == "ties":
        z = np.round(z * 2) / 2 + 0.0  # the sampler hands over no -0.0
        z[0, :VOCAB] = 0.0
    if kind == "banned":
        z[:, 100:] = -np.inf
        z[0, 1:] = -np.inf
    if kind == "flat":
        z *= 1e-3
    return z


def keep(ops: Any, z: Host, w: Host, unit: Host, need: tuple[Host, Host]) -> Host:
    if ops is NUMPY:
        law: Host = sampling.keep_top(NUMPY, z, w, unit, need)
        return law
    tensors = map(torch.from_numpy, (z, w, unit))
    found: Host = ops.keep_top(*tensors, tuple(map(torch.from_numpy, need))).numpy()
    return found


@pytest.mark.parametrize("ops", [TORCH, ASYNCHRONOUS])
@pytest.mark.parametrize("kind", ["random", "ties", "banned", "flat"])
@pytest.mark.parametrize("k", [[1, 2, 50, 1023, 1024, 1025], [1, 2500, 2999, 3000, 3008, 100]])
def test_top_k_keeps_the_same_ids_as_the_law(ops: Any, kind: str, k: list[int]) -> None:
    z = logits(kind)
    w = weights_of(z)
    need = sampling._carry(np.zeros(ROWS, np.int64), np.array(k) - 1)
    law = keep(NUMPY, z, w, np.ones_like(w), need)
    np.testing.assert_array_equal(keep(ops, z, w, np.ones_like(w), need), law)


@pytest.mark.parametrize("ops", [TORCH, ASYNCHRONOUS])
@pytest.mark.parametrize("kind", ["random", "ties", "banned", "flat"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_same_ids_as_the_law(ops: Any, kind: str, share: float) -> None:
    z = logits(kind)
    w = weights_of(z)
    total = w.sum(-1)
    need = np.minimum((total * share).astype(np.int64), total - 1)
    pair = (need >> sampling.LOW, need & ((1 << sampling.LOW) - 1))
    law = keep(NUMPY, z, w, w, pair)
    np.testing.assert_array_equal(keep(ops, z, w, w, pair), law)


def test_a_filter_leaves_its_argument_alone() -> None:
    z = logits("random")
    w = torch.from_numpy(weights_of(z))
    before = w.clone()
    need = (torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), 4))
    TORCH.keep_top(torch.from_numpy(z), w, torch.ones_like(w), need)
    assert torch.equal(w, before)


@pytest.mark.parametrize("kind", ["random", "ties", "banned"])
def test_the_largest_come_in_order_and_ties_by_id(kind: str) -> None:
    z = logits(kind)
    values, ids = TORCH.top(torch.from_numpy(z), 20)
    law_values, law_ids = NUMPY.top(z, 20)
    np.testing.assert_array_equal(values.numpy(), law_values)
    np.testing.assert_array_equal(ids.numpy(), law_ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocked_weights_give_what_plain_weights_give(dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 80, generator=generator).to(torch_dtype)
    bias = torch.randn(96, generator=generator).to(torch_dtype)
    packed = packing.pack(weight)
    if packed is None:
        pytest.skip(f"this torch has no blocked layout for {dtype}: nothing to compare")
    assert torch.equal(packing.unpack(packed), weight)
    with torch.inference_mode():
        for rows in (1, 7, 40):
            x = torch.randn(rows, 80, generator=generator).to(torch_dtype)
            blocked = TORCH.linear(x, Param({"packed": packed, "bias": bias})).double()
            exact = x.double() @ weight.double().T + bias.double()
            bound = 1e-5 if dtype == "float32" else 2.0**-8 * exact.abs().max()
            assert (blocked - exact).abs().max() < bound


@pytest.mark.parametrize("role", ["packed", "plain", "chunked"])
def test_logits_of_bfloat16_are_not_rounded_to_bfloat16(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_core.bindings.torch import ops as module

    if role != "packed":
        monkeypatch.setattr(packing, "pack", lambda weight: None)
    if role == "chunked":
        monkeypatch.setattr(module, "LOGIT_CHUNK", 1000)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 64, generator=generator).bfloat16()
    x = torch.randn(5, 64, generator=generator).bfloat16()
    out = TORCH.logits(x, Param({"weight": weight}))
    exact = x.double() @ weight.double().T
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 2.0**-15 * exact.abs().max()


@pytest.mark.parametrize("ops", [TORCH, ASYNCHRONOUS])
def test_experts_get_their_own_tokens_and_none_gets_padding(ops: TorchOps) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((9, 8))
    w1, w2 = rng.standard_normal((4, 12, 8)), rng.standard_normal((4, 8, 6))
    router, valid = rng.standard_normal((9, 4)), np.arange(9) < 7
    x[7:] = np.nan
    router[7:] = np.nan
    law_ids, law_weights = NUMPY.moe_route(router[:7], 2, True, valid[:7])
    host = Param({"weight": w1}), Param({"weight": w2})
    law = NUMPY.moe_experts(x[:7], law_ids, law_weights, *host)
    ids, weights = ops.moe_route(torch.from_numpy(router), 2, True, torch.from_numpy(valid))
    np.testing.assert_array_equal(ids[:7].numpy(), law_ids)
    np.testing.assert_array_equal(ids[7:].numpy(), 4)
    params = (Param({"weight": torch.from_numpy(w)}) for w in (w1, w2))
    out = ops.moe_experts(torch.from_numpy(x), ids, weights, *params)
    np.testing.assert_allclose(out[:7].numpy(), law, rtol=1e-12)
    assert not out[7:].any()


def test_a_reversed_row_of_the_host_arrives_reversed() -> None:
    row = np.arange(3, dtype=np.float32)[None][::-1]
    assert TORCH.host(TORCH.asarray(row)).tolist() == [[0.0, 1.0, 2.0]]
