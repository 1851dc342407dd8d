"""Numerical solvers: functions of tensors without knowledge of recipes or models.

``W`` [d_out, d_in] is the weight of a linear layer, ``y = x @ W.T``; ``H`` [d_in, d_in] and ``G``
[d_out, d_out] are second moments of its inputs and of the loss gradients at its output. In results,
`energy` is the weighted squared error ``tr(G E H E^T)`` of ``E = W - W_hat``, `loss` is `energy` as
a fraction of the weighted energy of W, and `fallback` describes a deviation from the request, if
any.
"""
