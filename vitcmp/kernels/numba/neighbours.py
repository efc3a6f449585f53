"""Products of each query with its own few keys, compiled by numba.

Every kernel fills the rows begin to end of its result, counted over all heads g; threads share the rows among them.
The loops over pairs take four at a time, so that the row that these share is read once.
"""

from __future__ import annotations

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel


@inner
def _scores(q, k, keys, out, begin, end):  # type: ignore[no-untyped-def]
    """out[g, i, j] = q[g, i] . k[g, keys[i, j]]"""
    zero = q.dtype.type(0)
    for row in range(begin, end):
        g, i = divmod(row, len(keys))
        x, y, mine, result = q[g, i], k[g], keys[i], out[g, i]
        whole = len(mine) // 4 * 4
        for j in range(0, whole, 4):
            y0, y1, y2, y3 = y[mine[j]], y[mine[j + 1]], y[mine[j + 2]], y[mine[j + 3]]
            s0, s1, s2, s3 = zero, zero, zero, zero
            for c in range(len(x)):
                s0 += x[c] * y0[c]
                s1 += x[c] * y1[c]
                s2 += x[c] * y2[c]
                s3 += x[c] * y3[c]
            result[j], result[j + 1], result[j + 2], result[j + 3] = s0, s1, s2, s3
        for j in range(whole, len(mine)):
            y0, s0 = y[mine[j]], zero
            for c in range(len(x)):
                s0 += x[c] * y0[c]
            result[j] = s0


@inner
def _mixed(weights, v, keys, out, begin, end):  # type: ignore[no-untyped-def]
    """out[g, i] = sum_j weights[g, i, j] v[g, keys[i, j]]"""
    for row in range(begin, end):
        g, i = divmod(row, len(keys))
        w, y, mine, result = weights[g, i], v[g], keys[i], out[g, i]
        whole = len(mine) // 4 * 4
        result[:] = 0
        for j in range(0, whole, 4):
            w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
            y0, y1, y2, y3 = y[mine[j]], y[mine[j + 1]], y[mine[j + 2]], y[mine[j + 3]]
            for c in range(len(result)):
                result[c] += (w0 * y0[c] + w1 * y1[c]) + (w2 * y2[c] + w3 * y3[c])
        for j in range(whole, len(mine)):
            w0, y0 = w[j], y[mine[j]]
            for c in range(len(result)):
                result[c] += w0 * y0[c]


@inner
def _spread(weights, x, queries, places, ends, out, begin, end):  # type: ignore[no-untyped-def]
    """out[g, n] = the sum of weights[g, i, j] x[g, i] over the pairs with keys[i, j] = n.

    Those are listed from ends[n] to ends[n + 1]: i in `queries`, j in `places`.
    """
    for row in range(begin, end):
        g, n = divmod(row, out.shape[1])
        w, y, result = weights[g], x[g], out[g, n]
        first, last = ends[n], ends[n + 1]
        whole = first + (last - first) // 4 * 4
        result[:] = 0
        for e in range(first, whole, 4):
            i0, i1, i2, i3 = queries[e], queries[e + 1], queries[e + 2], queries[e + 3]
            w0, w1, w2, w3 = w[i0, places[e]], w[i1, places[e + 1]], w[i2, places[e + 2]], w[i3, places[e + 3]]
            y0, y1, y2, y3 = y[i0], y[i1], y[i2], y[i3]
            for c in range(len(result)):
                result[c] += (w0 * y0[c] + w1 * y1[c]) + (w2 * y2[c] + w3 * y3[c])
        for e in range(whole, last):
            w0, y0 = w[queries[e], places[e]], y[queries[e]]
            for c in range(len(result)):
                result[c] += w0 * y0[c]


@kernel
def scores(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_scores, team, args)


@kernel
def mixed(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_mixed, team, args)


@kernel
def spread(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_spread, team, args)
