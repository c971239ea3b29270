"""Every variant of equilibrium propagation is a table: which equilibria, with which weights.

    dC/dtheta ~ sum_k w_k dE/dtheta(s*(beta_k))

Each row is `(beta_k / beta, w_k beta)`. One-sided (Scellier and Bengio 2017, eq. 10) errs by O(beta), centered
(Laborieux et al. 2021, arXiv:2006.03824, eq. 6) by O(beta^2).
"""

Contrast = tuple[tuple[float, float], ...]

CONTRASTS: dict[str, Contrast] = {
    "one-sided": ((0.0, -1.0), (1.0, 1.0)),
    "centered": ((-1.0, -0.5), (1.0, 0.5)),
}
