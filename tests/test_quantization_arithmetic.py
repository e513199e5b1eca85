"""The arithmetic of quantization: promises over every shape and way, edge cases, bytes, agreement with the libraries."""
import math

import pytest
import torch
from hypothesis import given, settings as budget, strategies as st

from llmlab.kit.settings import UsageError
from llmlab.quantization import arithmetic as a

SLOW = budget(max_examples=60, deadline=None)
shapes = st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple)
way = st.fixed_dictionaries(dict(bits=st.integers(2, 16), symmetric=st.booleans(), granularity=st.sampled_from(a.GRANULARITIES), group_size=st.integers(1, 12),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def values(shape, seed, spread=1.):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def step(q): return a._spread(q.scale.float(), q.shape, q.group).expand(q.shape)


@SLOW
@given(shapes, way, st.integers(0, 99), st.floats(1e-3, 1e3))
def test_within_half_a_step_and_back_from_bytes(shape, how, seed, spread):
    x = values(shape, seed, spread)
    q = a.quantize(x, **how)
    assert q.shape == x.shape and q.dequantize().dtype == torch.float32
    assert ((q.dequantize() - x).abs() <= step(q) * .505 + 1e-30).all()
    p = q.packed()
    assert p.nbytes == q.nbytes and torch.equal(p.unpacked().codes, q.codes) and torch.equal(p.dequantize(), q.dequantize())


@SLOW
@given(way, st.integers(0, 99))
def test_zero_is_exact_and_order_is_kept(how, seed):
    x = values((3, 24), seed).sort(-1).values
    x[:, ::5] = 0
    q = a.quantize(x, **how)
    assert (q.dequantize()[x == 0] == 0).all()
    flat = x.flatten().sort().values
    assert (a.quantize(flat, **how | dict(granularity="tensor")).codes.long().diff() >= 0).all()


@SLOW
@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 3), st.integers(0, 99))
def test_a_stream_of_bits(bits, n, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    packed = a.pack(codes, bits)
    assert packed.shape == (rows, math.ceil(n * bits / 8)) and packed.dtype == torch.uint8
    assert torch.equal(a.unpack(packed, bits, n).long(), codes)
    for row, stored in zip(codes, packed):
        assert sum(int(c) << (bits * i) for i, c in enumerate(row)) == int.from_bytes(bytes(stored.tolist()), "little")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0., 1., -2.5, 1e-20, 3e4])
def test_a_constant_comes_back(value, symmetric):
    for granularity in a.GRANULARITIES:
        back = a.fake_quantize(torch.full((4, 6), value), symmetric=symmetric, granularity=granularity)
        torch.testing.assert_close(back, torch.full((4, 6), value), rtol=1e-5, atol=1e-30)


def test_one_bit_without_symmetry_has_two_levels():
    assert set(a.quantize(torch.tensor([[0., .2, .9, 1.]]), 1, symmetric=False).dequantize().flatten().tolist()) == {0., 1.}


def test_scalars_and_empty_tensors():
    for x in (torch.tensor(3.), torch.zeros(0), torch.zeros(0, 4), torch.zeros(4, 0)):
        q = a.quantize(x, granularity="tensor")
        assert q.dequantize().shape == x.shape and q.packed().dequantize().shape == x.shape and q.nbytes >= q.scale.nbytes
    assert a.quantize(torch.zeros(0, 4)).scale.shape == (0, 1) and a.quantize(torch.zeros(2, 0), granularity="group").scale.shape == (2, 0)


def test_a_last_group_may_be_shorter():
    x = values((3, 10), 0)
    q = a.quantize(x, 4, granularity="group", group_size=4)
    assert q.scale.shape == (3, 3)
    torch.testing.assert_close(q.scale[:, 2], x[:, 8:].abs().amax(1) / 7)


def test_clipping():
    q = a.quantize(torch.tensor([-9., -1., 0., 1., 9.]), granularity="tensor", low=-1, high=1)
    assert q.codes.tolist() == [-127, -127, 0, 127, 127]
    q = a.quantize(torch.tensor([0., 1., 9.]), granularity="tensor", symmetric=False, low=0, high=1)
    assert q.codes.tolist() == [0, 255, 255]
    limit = torch.tensor([[1.], [2.]])
    assert a.quantize(torch.full((2, 3), 5.), low=-limit, high=limit).dequantize()[:, 0].tolist() == pytest.approx([1., 2.])


@pytest.mark.parametrize("granularity", a.GRANULARITIES)
def test_the_best_clip_is_never_worse(granularity):
    x = values((6, 40), 1)
    x[0, 0] = 20.
    limit = a.best_clip(x, 4, granularity=granularity)
    assert a.rms(a.fake_quantize(x, 4, low=-limit, high=limit, granularity=granularity) - x) <= a.rms(a.fake_quantize(x, 4, granularity=granularity) - x)


@pytest.mark.parametrize("bad, match", [(dict(bits=0), "bits"), (dict(bits=17), "bits"), (dict(bits=1), "binary"), (dict(granularity="row"), "granularity"),
    (dict(granularity="group", group_size=0), "group_size"), (dict(low=1., high=0.), "low"), (dict(scale_dtype=torch.int8), "scale")])
def test_what_makes_no_sense_is_refused(bad, match):
    with pytest.raises(UsageError, match=match): a.quantize(torch.ones(2, 4), **bad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_with_its_place(value):
    x = torch.ones(2, 4)
    x[1, 2] = value
    for f in (a.quantize, a.binary, a.ternary, a.fixed_point, lambda t: a.code(t, a.normal_levels())):
        with pytest.raises(UsageError, match=r"\[1, 2\]"): f(x)
    with pytest.raises(UsageError, match="float"): a.quantize(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(UsageError, match="row"): a.quantize(torch.ones(4))


def test_a_range_beyond_floats_is_refused():
    with pytest.raises(UsageError, match="wider"): a.quantize(torch.tensor([-3e38, 3e38]), symmetric=False, granularity="tensor")
    with pytest.raises(UsageError, match="float16"): a.quantize(torch.full((2, 2), 1e38), scale_dtype=torch.float16)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="0 … 7"): a.pack(torch.tensor([8]), 3)
    with pytest.raises(UsageError, match="0 … 7"): a.pack(torch.tensor([-1]), 3)
    with pytest.raises(UsageError, match="whole"): a.pack(torch.tensor([1.]), 3)
    with pytest.raises(UsageError, match="take 2 bytes"): a.unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
    with pytest.raises(UsageError, match="uint8"): a.unpack(torch.zeros(2), 3, 5)


def test_half_precision_input():
    x = values((3, 8), 2).bfloat16()
    assert a.fake_quantize(x).dtype == torch.bfloat16 and a.quantize(x).scale.dtype == torch.float32


def test_gradients_do_not_leak():
    w = values((3, 8), 2).requires_grad_()
    assert not a.quantize(w).dequantize().requires_grad


def test_binary_and_ternary_survive_packing():
    x = values((5, 37), 3)
    for granularity in a.GRANULARITIES:
        for q, levels in ((a.binary(x, granularity), {-1, 1}), (a.ternary(x, granularity), {-1, 0, 1})):
            assert set(q.codes.unique().tolist()) == levels
            assert torch.equal(q.packed().dequantize(), q.dequantize()) and q.packed().nbytes == q.nbytes
    row = x[0]
    assert a.binary(x).scale[0].item() == pytest.approx(row.abs().mean().item())
    kept = row.abs() > .7 * row.abs().mean()
    assert a.ternary(x).scale[0].item() == pytest.approx(row[kept].abs().mean().item())


def test_fixed_point_is_two_s_complement():
    q = a.fixed_point(torch.tensor([-2., -1., -.5, 0., .3, 1.]), 8, 7)
    assert q.codes.tolist() == [-128, -128, -64, 0, 38, 127]
    assert torch.equal(q.packed().unpacked().codes, q.codes)


def test_ties_go_to_the_even_mantissa():
    levels = a.minifloat(*a.MINIFLOATS["e2m1"])
    x = torch.tensor([.25, .75, 1.25, 1.75, 2.5, 3.5, 5.])
    assert levels[a.nearest(x, levels)].tolist() == [0., 1., 1., 2., 2., 4., 4.]
    assert levels[a.nearest(-x, levels)].tolist() == [0., -1., -1., -2., -2., -4., -4.]


@pytest.mark.parametrize("kind", a.MINIFLOATS)
def test_blocks_with_a_shared_exponent_agree_with_torchao(kind):
    x = values((8, 96), 4) * torch.logspace(-6, 6, 8)[:, None]
    x[3] = 0
    mine = a.code(x, a.minifloat(*a.MINIFLOATS[kind]), shared_exponent=True)
    assert mine.scale.dtype == torch.uint8 and torch.equal(mine.dequantize(), a.torchao_block(x, kind))


def test_normal_levels_are_those_of_the_paper():
    published = [-1., -.6961928, -.5250731, -.3949175, -.2844414, -.1847734, -.0910500, 0.,
        .0795803, .1609302, .2461123, .3379152, .4407098, .5626170, .7229568, 1.]
    torch.testing.assert_close(a.normal_levels(), torch.tensor(published), atol=1e-6, rtol=0)


def test_blocks_that_do_not_divide():
    x = values((3, 70), 5)
    q = a.code(x, a.normal_levels(), 64)
    assert q.scale.shape == (3, 2) and q.nbytes == 3 * 35 + q.scale.nbytes
    assert (q.dequantize() - x).abs().max() < x.abs().max() * .2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", a.GRANULARITIES)
def test_codes_agree_with_torchao(granularity, symmetric):
    x = values((16, 64), 6)
    for bits in (8, 5, 4, 2):
        how = dict(symmetric=symmetric, granularity=granularity)
        assert torch.equal(a.torchao_codes(x, bits, **how), a.quantize(x, bits, **how).codes)
