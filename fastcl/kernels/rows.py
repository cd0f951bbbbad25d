"""Row-local passes at both ends: L2 normalisation with the positives, the loss of every row, and the way back.

All read every row once and write every result once; nothing is O(m^2) here.
"""

import triton
import triton.language as tl

# The length below which a row counts as zero: it is divided by this, and receives no gradient.
EPS = tl.constexpr(1e-12)


@triton.jit
def _load_row(p_x, o_m, o_d, stride_m, stride_d, mask):
    p = p_x + o_m.to(tl.int64)[:, None] * stride_m + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unit(x):
    """(x / max(||x||, EPS), 1 / ||x|| or 0). Scaled by the largest entry: its square, and the length too, may not be a
    number."""
    peak = tl.max(tl.abs(x), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    y = x / peak[:, None]
    norm = tl.sqrt_rn(tl.sum(y * y, 1))
    short = norm * peak < EPS
    unit = tl.where(short[:, None], x / EPS, y / norm[:, None])
    return unit, tl.where(short, 0.0, 1.0 / norm / peak)


@triton.jit
def _project(z, dz, rnorm):
    """Back through the normalisation. A row that was not a number has no zero gradient: rnorm is NaN there."""
    return (dz - z * tl.sum(z * dz, 1)[:, None]) * rnorm[:, None]


@triton.jit(do_not_specialize=["n"])
def normalize_pair_kernel(
    p_x1,  # [n, d], any strides
    p_x2,  # [n, d], any strides
    p_z,  # [2n, d]: x1 above x2, rounded to the type of the matrix products
    p_rnorm,  # [2n] fp32
    p_pos,  # [n] fp32: <z_i, z_(i+n)> of the rounded rows
    n,
    d,
    stride_x1m,
    stride_x1d,
    stride_x2m,
    stride_x2d,
    stride_z,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_m < n
    mask = m_row[:, None] & (o_d < d)[None, :]
    x1 = _load_row(p_x1, o_m, o_d, stride_x1m, stride_x1d, mask)
    x2 = _load_row(p_x2, o_m, o_d, stride_x2m, stride_x2d, mask)
    if NORMALIZE:
        x1, rnorm1 = _unit(x1)
        x2, rnorm2 = _unit(x2)
        tl.store(p_rnorm + o_m, rnorm1, mask=m_row)
        tl.store(p_rnorm + n + o_m, rnorm2, mask=m_row)
    z1 = x1.to(p_z.dtype.element_ty)
    z2 = x2.to(p_z.dtype.element_ty)
    p_z1 = p_z + o_m.to(tl.int64)[:, None] * stride_z + o_d[None, :]
    p_z2 = p_z + (n + o_m).to(tl.int64)[:, None] * stride_z + o_d[None, :]
    tl.store(p_z1, z1, mask=mask)
    tl.store(p_z2, z2, mask=mask)
    tl.store(p_pos + o_m, tl.sum(z1.to(tl.float32) * z2.to(tl.float32), 1), mask=m_row)


@triton.jit(do_not_specialize=["n"])
def unit_rows_kernel(
    p_x,  # [n, d], any strides
    p_z,  # [n, d] fp32
    p_rnorm,  # [n] fp32
    n,
    d,
    stride_m,
    stride_d,
    ROUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < n)[:, None] & (o_d < d)[None, :]
    z, rnorm = _unit(_load_row(p_x, o_m, o_d, stride_m, stride_d, mask))
    tl.store(p_rnorm + o_m, rnorm, mask=o_m < n)
    p_out = p_z + o_m.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p_out, z.to(ROUNDED).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["n"])
def unit_rows_backward_kernel(
    p_z,  # [n, d] fp32
    p_rnorm,  # [n] fp32
    p_dz,  # [n, d] fp32, any strides
    p_dx,  # [n, d]
    n,
    d,
    stride_m,
    stride_d,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < n)[:, None] & (o_d < d)[None, :]
    z = _load_row(p_z, o_m, o_d, d, 1, mask)
    dz = _load_row(p_dz, o_m, o_d, stride_m, stride_d, mask)
    rnorm = tl.load(p_rnorm + o_m, mask=o_m < n, other=0.0)
    p_out = p_dx + o_m.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p_out, _project(z, dz, rnorm).to(p_dx.dtype.element_ty), mask=mask)


@triton.jit
def _softplus(x):
    """(log(1 + exp(x)), its slope) in fp64, exact at both ends."""
    e = tl.exp(-tl.abs(x))
    whole = 1.0 + e
    # log(1 + e) of small e: the logarithm of the rounded sum, over the sum's own difference from 1.
    near = tl.where(whole == 1.0, e, tl.log(whole) * (e / tl.where(whole == 1.0, 1.0, whole - 1.0)))
    return tl.where(x > 0, x, 0.0) + near, tl.where(x > 0, 1.0, e) / whole


@triton.jit(do_not_specialize=["n"])
def pair_loss_kernel(
    p_lse,  # [2n] fp64: log-sum-exp of the negatives
    p_pos,  # [n] fp32
    p_scale,  # []
    p_loss,  # [2n], or [programs] fp64 with SUM
    p_whole,  # [2n] fp64: log-sum-exp of all that the row's sum counts
    p_share,  # [2n] fp64: of the negatives in it
    n,
    # Python's numbers, all of them: in fp32 the rest below would not be 0.
    weight: "fp64",  # of the log-sum-exp
    pull: "fp64",  # of the positive, with PULLED; else that is weight * scale
    PULLED: tl.constexpr,
    POSITIVE_COUNTS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One number a row, in fp64: nothing rounds what the tiles computed."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < 2 * n
    scale = tl.load(p_scale).to(tl.float64)
    pos = tl.load(p_pos + tl.where(o_m < n, o_m, o_m - n), mask=m_row, other=0.0).to(tl.float64)
    whole = tl.load(p_lse + o_m, mask=m_row, other=0.0)
    x = whole - scale * pos
    # One pair alone has no negatives: x = -inf, loss 0 and gradient 0, to the bit.
    if POSITIVE_COUNTS:
        loss, share = _softplus(x)
        whole = scale * pos + loss
    else:
        share = tl.where(x == float("-inf"), 0.0, 1.0).to(tl.float64)
        loss = tl.where(x == float("-inf"), 0.0, x)
    loss *= weight
    if PULLED:
        # In fp64: it is 0 where the loss is a multiple of NT-Xent.
        loss -= (pull - weight * scale) * pos
    tl.store(p_whole + o_m, whole, mask=m_row)
    tl.store(p_share + o_m, share, mask=m_row)
    if SUM:
        tl.store(p_loss + tl.program_id(0), tl.sum(tl.where(m_row, loss, 0.0)))
    else:
        tl.store(p_loss + o_m, loss.to(p_loss.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["count", "divisor"])
def sum_kernel(
    p_x,  # [count] fp64
    p_sum,  # []
    count,
    divisor,
    BLOCK: tl.constexpr,
):
    """The sum over the divisor, by one program in one order."""
    o = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(p_x + first + o, mask=first + o < count, other=0.0)
    tl.store(p_sum, (tl.sum(total) / divisor).to(p_sum.dtype.element_ty))


@triton.jit
def _pull(p_share, p_w, o, m_row, grad, factor, rest):
    """(how strongly a row is pulled to its partner, its upstream gradient, its share), in fp64."""
    share = tl.load(p_share + o, mask=m_row, other=0.0)
    upstream = grad
    if p_w is not None:
        upstream = grad * tl.load(p_w + o, mask=m_row, other=0.0).to(tl.float64)
    return upstream * (factor * share + rest), upstream, share


@triton.jit
def _row_grad(z, partner, grad, rnorm, factor, pull, NORMALIZE: tl.constexpr):
    dz = factor * grad - pull[:, None] * partner
    if NORMALIZE:
        dz = _project(z, dz, rnorm)
    return dz


@triton.jit(do_not_specialize=["n", "divisor"])
def pair_backward_kernel(
    p_z,  # [2n, d]
    p_rnorm,  # [2n] fp32
    p_grad_lse,  # [2n, d] fp32: gradient of the log-sum-exps, without any factor
    p_pos,  # [n] fp32
    p_share,  # [2n] fp64
    p_scale,  # []
    p_grad,  # []: upstream, over the divisor
    p_w,  # [2n] fp32, or None for ones
    p_dx1,  # [n, d]
    p_dx2,  # [n, d]
    p_slope,  # [2n] fp64: of each row in the gradient of the scale
    n,
    d,
    stride_z,
    divisor,
    weight: "fp64",  # as above
    pull: "fp64",
    PULLED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_m < n
    mask = m_row[:, None] & (o_d < d)[None, :]
    grad = tl.load(p_grad).to(tl.float64) / divisor
    factor = tl.load(p_scale).to(tl.float64) * weight
    rest = factor * 0.0
    if PULLED:
        rest = pull - factor
    pull1, upstream1, share1 = _pull(p_share, p_w, o_m, m_row, grad, factor, rest)
    pull2, upstream2, share2 = _pull(p_share, p_w, n + o_m, m_row, grad, factor, rest)
    if PULLED:
        # The positive itself does not depend on the scale.
        share1 -= 1.0
        share2 -= 1.0
    z1 = _load_row(p_z, o_m, o_d, stride_z, 1, mask)
    z2 = _load_row(p_z, n + o_m, o_d, stride_z, 1, mask)
    grad1 = _load_row(p_grad_lse, o_m, o_d, d, 1, mask)
    grad2 = _load_row(p_grad_lse, n + o_m, o_d, d, 1, mask)
    # Each product stands in row i and in row k of the gradient, hence the half.
    pos = tl.load(p_pos + o_m, mask=m_row, other=0.0).to(tl.float64)
    slope1 = 0.5 * grad * tl.sum(z1 * grad1, 1) - upstream1 * share1 * pos
    slope2 = 0.5 * grad * tl.sum(z2 * grad2, 1) - upstream2 * share2 * pos
    tl.store(p_slope + o_m, weight * slope1, mask=m_row)
    tl.store(p_slope + n + o_m, weight * slope2, mask=m_row)
    both = (pull1 + pull2).to(tl.float32)
    rnorm1 = both
    rnorm2 = both
    if NORMALIZE:
        rnorm1 = tl.load(p_rnorm + o_m, mask=m_row, other=0.0)
        rnorm2 = tl.load(p_rnorm + n + o_m, mask=m_row, other=0.0)
    factor = (grad * factor).to(tl.float32)
    dx1 = _row_grad(z1, z2, grad1, rnorm1, factor, both, NORMALIZE)
    dx2 = _row_grad(z2, z1, grad2, rnorm2, factor, both, NORMALIZE)
    o_out = o_m.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p_dx1 + o_out, dx1.to(p_dx1.dtype.element_ty), mask=mask)
    tl.store(p_dx2 + o_out, dx2.to(p_dx2.dtype.element_ty), mask=mask)
