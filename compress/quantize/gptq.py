"""prototype"""

from __future__ import annotations
import math, time
import torch
from compress.core import ranges
from compress.core.affine import quantize
from compress.core.linalg import NotPositiveDefinite, damped, dead_columns, inverse_cholesky
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid


def gptq(
    W,
    H,
    grid,
    *,
    scale_dtype,
    range="importance",
    act_order="static",
    damping=0.01,
    block_size=128,
    impd=True,
):
    n = W.shape[1]
    gs = grid.group_size or n
    dead = dead_columns(H)
    H = H.clone()
    H[dead] = 0
    H[:, dead] = 0
    H.diagonal()[dead] = H.diagonal().mean()
    diag = H.diagonal()
    imp = (diag + (damping * diag.mean() if impd else 0)).float()
    if act_order == "static":
        order = torch.argsort(diag, descending=True, stable=True)
    elif act_order == "group":
        d = diag.view(-1, gs)
        inner = torch.argsort(d, dim=1, descending=True, stable=True)
        outer = torch.argsort(d.amax(1), descending=True, stable=True)
        order = (inner + torch.arange(0, n, gs)[:, None])[outer].flatten()
    else:
        order = torch.arange(n)
    U, used = inverse_cholesky(H[order[:, None], order], damping)
    U = U.float()
    dynamic = act_order != "static"
    S, Z = ranges.choose(W, grid, scale_dtype, range, imp)
    gid = (order // gs).tolist()
    st = S.float().T.contiguous()
    zt = Z.float().T.contiguous() if Z is not None else None
    Wt = W.T[order].contiguous()
    Q = torch.empty_like(Wt)
    step = math.gcd(block_size, gs) if dynamic else block_size
    one = Grid(grid.bits, grid.symmetric, None)
    oimp = imp[order]
    S = S.clone()
    Z = None if Z is None else Z.clone()
    lo, hi = grid.qmin, grid.qmax
    E = torch.empty(min(step, n), W.shape[0])
    for a in builtins_range(0, n, step):
        b = min(a + step, n)
        if dynamic and a % gs == 0:
            g = gid[a]
            s, z = ranges.choose(Wt[a : a + gs].T.contiguous(), one, scale_dtype, range, oimp[a : a + gs])
            S[:, g] = s[:, 0]
            st[g] = s[:, 0].float()
            if z is not None:
                Z[:, g] = z[:, 0]
                zt[g] = z[:, 0].float()
        T = U[a:b, a:b].T.contiguous()
        dg = T.diagonal().tolist()
        for k in builtins_range(b - a):
            w = Wt[a + k]
            if k:
                w.addmv_(E[:k].T, T[k, :k], alpha=-1)
            g = gid[a + k]
            q = Q[a + k]
            torch.div(w, st[g], out=q).round_()
            if zt is None:
                q.clamp_(lo, hi)
                d = q * st[g]
            else:
                q.add_(zt[g]).clamp_(lo, hi)
                d = (q - zt[g]).mul_(st[g])
            torch.sub(w, d, out=E[k]).div_(dg[k])
        if b < n:
            Wt[b:].addmm_(U[a:b, b:].T, E[: b - a], alpha=-1)
    codes = torch.empty_like(Q)
    codes[order] = Q
    return QuantizedTensor(codes.T.contiguous().to(torch.int8), S, Z, grid)


builtins_range = __builtins__["range"] if isinstance(__builtins__, dict) else __builtins__.range
