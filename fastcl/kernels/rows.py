"""Row-local passes at both ends: L2 normalisation with the positives, and its backward.

Both read every row once and write every result once; nothing is O(m^2) here.
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
    """(x / max(||x||, EPS), 1 / ||x|| or 0). Scaled by the largest entry: its square may not be a number."""
    peak = tl.max(tl.abs(x), 1)
    peak = tl.where(peak > 0, peak, 1.0)
    y = x / peak[:, None]
    norm = tl.sqrt_rn(tl.sum(y * y, 1)) * peak
    unit = x / tl.maximum(norm, EPS, propagate_nan=tl.PropagateNan.ALL)[:, None]
    return unit, tl.where(norm < EPS, 0.0, 1.0 / norm)


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


@triton.jit
def _row_grad(z, partner, grad, rnorm, lse_coef, pull, NORMALIZE: tl.constexpr):
    dz = lse_coef * grad - pull[:, None] * partner
    if NORMALIZE:
        # A row that was not a number must not turn into a zero gradient: rnorm is NaN there.
        dz = (dz - z * tl.sum(z * dz, 1)[:, None]) * rnorm[:, None]
    return dz


@triton.jit(do_not_specialize=["n"])
def pair_backward_kernel(
    p_z,  # [2n, d]
    p_rnorm,  # [2n] fp32
    p_grad,  # [2n, d] fp32: gradient of the log-sum-exp part, without its coefficient
    p_lse_coef,  # []
    p_pull,  # [2n] fp32: how strongly row i is pulled to its partner
    p_dx1,  # [n, d]
    p_dx2,  # [n, d]
    p_rowdot,  # [2n] fp32: <z_i, grad_i>
    n,
    d,
    stride_z,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_m < n
    mask = m_row[:, None] & (o_d < d)[None, :]
    lse_coef = tl.load(p_lse_coef)
    pull = tl.load(p_pull + o_m, mask=m_row, other=0.0) + tl.load(p_pull + n + o_m, mask=m_row, other=0.0)
    z1 = _load_row(p_z, o_m, o_d, stride_z, 1, mask)
    z2 = _load_row(p_z, n + o_m, o_d, stride_z, 1, mask)
    grad1 = _load_row(p_grad, o_m, o_d, d, 1, mask)
    grad2 = _load_row(p_grad, n + o_m, o_d, d, 1, mask)
    tl.store(p_rowdot + o_m, tl.sum(z1 * grad1, 1), mask=m_row)
    tl.store(p_rowdot + n + o_m, tl.sum(z2 * grad2, 1), mask=m_row)
    rnorm1 = pull
    rnorm2 = pull
    if NORMALIZE:
        rnorm1 = tl.load(p_rnorm + o_m, mask=m_row, other=0.0)
        rnorm2 = tl.load(p_rnorm + n + o_m, mask=m_row, other=0.0)
    dx1 = _row_grad(z1, z2, grad1, rnorm1, lse_coef, pull, NORMALIZE)
    dx2 = _row_grad(z2, z1, grad2, rnorm2, lse_coef, pull, NORMALIZE)
    o_out = o_m.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p_dx1 + o_out, dx1.to(p_dx1.dtype.element_ty), mask=mask)
    tl.store(p_dx2 + o_out, dx2.to(p_dx2.dtype.element_ty), mask=mask)
