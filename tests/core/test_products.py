import re

import pytest
import torch

from mixtura.core import native, products
from mixtura.core.packing import WIDTHS, pack
from mixtura.core.quantize import nearest


def spans_of(counts):
    spans, first = [], 0
    for e, count in enumerate(counts):
        if count:
            spans.append((e, first, first + count))
        first += count
    return spans


# Rows of an expert decide which product runs: 1, 2, a few, more; the block's mean decides about the C kernel.
COUNTS = [[1], [2, 0, 1], [3, 5, 0, 4], [7, 1, 40], [64]]


def draw(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact(x, weight, spans, bias=None):
    parts = [x[a:b].double() @ weight[e].double().T + (0 if bias is None else bias[e].double()) for e, a, b in spans]
    return torch.cat(parts)


def assert_near(got, want, dtype):
    # Sums of 64 products: float32 rounds at 6e-8, bfloat16 rounds its result at 4e-3.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kernel", [True, False])
def test_grouped_products_match_float64_span_by_span(dtype, transposed, counts, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(native, "why_not", lambda x, weight: "switched off")
    spans, n_rows = spans_of(counts), sum(counts)
    x, weight, bias = (draw(*s, dtype=dtype) for s in ((n_rows, 64), (len(counts), 24, 64), (len(counts), 24)))
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    got = products.grouped_linear(x, stored, bias, spans, transposed=transposed)
    assert got.dtype == dtype
    assert_near(got, exact(x, weight, spans, bias), dtype)
    y = draw(n_rows, 24, dtype=dtype)
    back = products.grouped_times(y, stored, spans, transposed=transposed)
    assert_near(back, exact(y, weight.transpose(1, 2), spans), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", range(1, 12))
@pytest.mark.parametrize(("n_out", "n_in"), [(4, 32), (36, 96), (128, 64)])
def test_the_c_kernel_matches_float64_for_every_tile(dtype, n_rows, n_out, n_in):
    x, weight = draw(n_rows + 1, n_in, dtype=dtype), draw(3, n_out, n_in, dtype=dtype)
    reason = native.why_not(x, weight)
    if reason is not None:
        pytest.skip(reason)
    spans = [(2, 0, n_rows), (0, n_rows, n_rows + 1)]
    assert_near(native.skinny(x, weight, spans), exact(x, weight, spans), dtype)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n_rows", [0, 1, 2, 4, 7])
@pytest.mark.parametrize(("n_out", "n_groups", "size"), [(8, 1, 16), (24, 3, 48), (10, 4, 128), (64, 2, 512)])
def test_the_packed_kernel_matches_float64_wherever_a_run_of_bytes_crosses_groups(bits, n_rows, n_out, n_groups, size):
    matrix = nearest(draw(n_out, n_groups * size, dtype=torch.float32), bits, size)
    codes = pack(matrix.codes.view(n_out, n_groups, size).transpose(0, 1).reshape(-1), bits)
    scale = matrix.scale.half().T.contiguous().view(torch.int16)
    zero = None if matrix.zero is None else matrix.zero.T.contiguous()
    x = draw(n_rows, n_groups * size, dtype=torch.float32)
    reason = native.why_not_packed(x, bits, n_groups, n_out)
    if reason is not None:
        pytest.skip(reason)
    want = x.double() @ matrix.dequantize().double().T
    # Each input is off by up to 2^-17 of its group's largest one, about 2^-15 of a typical one; sums over inputs average it.
    got = native.packed(x, codes, scale, zero, bits).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()) if n_rows else 0)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("n_out", "n_groups", "size"), [(8, 1, 16), (24, 3, 48), (10, 4, 128), (64, 2, 512)])
def test_packed_codes_become_the_values_they_stand_for_to_the_bit(bits, n_out, n_groups, size):
    matrix = nearest(draw(n_out, n_groups * size, dtype=torch.float32), bits, size)
    codes = pack(matrix.codes.view(n_out, n_groups, size).transpose(0, 1).reshape(-1), bits)
    zero = None if matrix.zero is None else matrix.zero.T.contiguous()
    reason = native.why_not_packed(torch.zeros(1, n_groups * size), bits, n_groups, n_out)
    if reason is not None:
        pytest.skip(reason)
    scale = matrix.scale.half().T.contiguous().view(torch.int16)
    got = native.packed_values(codes, scale, zero, bits, n_groups * size)
    assert torch.equal(got, matrix.dequantize())


def test_the_packed_kernel_reads_every_float16_scale_down_to_the_smallest():
    # float16 has subnormal scales down to 6e-8; a group of zeros gets one.
    x, scale = torch.ones(1, 16), torch.tensor([[6e-8, 1.0, 65504.0, 1e-5, 0.1, 2.0, 3e-6, 0.5]])
    codes = pack(torch.ones(8 * 16, dtype=torch.uint8), 2)
    if (reason := native.why_not_packed(x, 2, 1, 8)) is not None:
        pytest.skip(reason)
    got = native.packed(x, codes, scale.half().view(torch.int16), torch.zeros(1, 8, dtype=torch.uint8), 2)
    torch.testing.assert_close(got, 16 * scale.half().float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_packed_kernel_hides_no_input_that_is_not_finite(bad):
    x = torch.ones(2, 32)
    x[0, 20] = bad
    if (reason := native.why_not_packed(x, 1, 2, 8)) is not None:
        pytest.skip(reason)
    one = torch.ones(2, 8).half().view(torch.int16)
    got = native.packed(x, torch.zeros(2 * 8 * 2, dtype=torch.uint8), one, None, 1)
    assert got[0].isnan().all() and torch.allclose(got[1], torch.full((8,), -32.0))


@pytest.mark.parametrize(
    ("x", "groups", "n_out", "reason"),
    [
        (torch.zeros(1, 32).double(), 1, 8, "float64"),
        (torch.zeros(1, 24), 1, 8, "got 1 x 8 x 24"),
        (torch.zeros(1, 1024), 1, 8, "<= 512"),
        (torch.zeros(1, 32), 1, 6, "fill whole bytes"),
        (torch.zeros(1, 32, device="meta"), 1, 8, "runs on the CPU"),
    ],
)
def test_the_packed_kernel_says_what_it_cannot_multiply(x, groups, n_out, reason):
    assert re.search(reason, native.why_not_packed(x, 3, groups, n_out) or "")


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.zeros(1, 32).double(), torch.zeros(1, 4, 32).double(), "float32 or bfloat16"),
        (torch.zeros(1, 32).bfloat16(), torch.zeros(1, 4, 32), "both alike"),
        (torch.zeros(1, 33), torch.zeros(1, 4, 33), r"4 a rows and 32 b columns, got \(1, 4, 33\)"),
        (torch.zeros(1, 32), torch.zeros(1, 3, 32), "4 a rows"),
        (torch.zeros(1, 32), torch.zeros(1, 32, 4).transpose(1, 2), "contiguous"),
    ],
)
def test_the_c_kernel_says_what_it_cannot_multiply(x, weight, reason):
    assert re.search(reason, native.why_not(x, weight) or "")


@pytest.fixture
def fresh_library(monkeypatch):
    monkeypatch.delenv("MIXTURA_NATIVE", raising=False)
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def test_without_a_compiler_there_is_a_reason_and_no_error(monkeypatch, fresh_library):
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in native.why_not(torch.zeros(1, 32), torch.zeros(1, 4, 32))


def test_the_kernel_can_be_switched_off(monkeypatch, fresh_library):
    monkeypatch.setenv("MIXTURA_NATIVE", "0")
    assert native.why_not(torch.zeros(1, 32), torch.zeros(1, 4, 32)) == "MIXTURA_NATIVE=0"


def test_a_build_that_fails_is_a_reason_and_leaves_nothing_behind(monkeypatch, fresh_library, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("this is not C")
    monkeypatch.setattr(native, "_SOURCES", (broken,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reason = native.why_not(torch.zeros(1, 32), torch.zeros(1, 4, 32))
    assert reason is not None and ("building or loading failed" in reason or "no C compiler" in reason)
    assert not list((tmp_path / "cache").rglob("*.so")) and not list((tmp_path / "cache").rglob("*.o"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_zeros_are_zeros_that_can_be_written_and_outlive_their_maker(dtype):
    like = torch.empty(3, 1 << 20, dtype=dtype)
    z = products.zeros_like(like)
    assert z.shape == like.shape and z.dtype == dtype and z.is_contiguous() and float(z.abs().sum()) == 0
    z[1] += 1
    assert float(z.sum()) == 1 << 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_gather_sum_is_a_weighted_sum_of_rows(dtype, weighted):
    rows, places = draw(9, 16, dtype=dtype), torch.randint(0, 9, (5, 3), generator=torch.Generator().manual_seed(0))
    weights = draw(5, 3, dtype=dtype) if weighted else None
    want = (rows[places].double() * (1 if weights is None else weights.double().unsqueeze(-1))).sum(1)
    assert_near(products.gather_sum(rows, places, weights), want, dtype)
