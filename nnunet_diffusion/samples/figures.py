"""How near a set of generated images is to a set of real ones, as functions of their features.

Every value is one of the features too: figures from different extractors, or from sets of different size, cannot be
compared.
"""

import numpy as np


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Computes FID (Heusel et al. 2017, Eq. 6): squared Fréchet distance of Gaussians with the sets' moments.

    ||m_r - m_g||^2 + tr(C_r) + tr(C_g) - 2 tr((C_r C_g)^(1/2)). With centered features X_r (n, d) and X_g (m, d), the
    last trace is the sum of the singular values of X_r X_g^T / sqrt((n - 1)(m - 1)): no square root of a matrix, and
    exact where the covariances are singular. Of spatial features it is sFID (Nash et al. 2021).

    Args:
        real: (n, d), n >= 2.
        generated: (m, d), m >= 2.

    Returns:
        0 for identical sets, in squared units of the features.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(real, generated, 2)
    means, spreads, factors = [], [], []
    for features in (real, generated):
        features = features.astype(np.float64)
        means.append(features.mean(0))
        centered = (features - means[-1]) / np.sqrt(len(features) - 1)
        spreads.append(np.square(centered).sum())
        factors.append(np.linalg.qr(centered, mode="r"))  # (min(n, d), d), of the same covariance
    trace = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    return max(0.0, float(np.square(means[0] - means[1]).sum() + sum(spreads) - 2 * trace))


def precision_and_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Computes improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2).

    A set covers what lies within one of its members' distance to that member's k-th nearest neighbor. Precision is the
    share of the generated that the real cover, recall the share of the real that the generated cover.

    Args:
        real: (n, d), n > k.
        generated: (m, d), m > k.
        k: Neighbors.

    Returns:
        Precision and recall in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, or a set has no k neighbors.
    """
    _check(real, generated, k + 1)
    return _covered(generated, real, k), _covered(real, generated, k)


def f1(precision: float, recall: float) -> float:
    """Computes the harmonic mean of precision and recall; 0 if both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _covered(points: np.ndarray, members: np.ndarray, k: int) -> float:
    """Returns the share of the points within the radius of any member."""
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(members, members)])  # 0 to itself
    return float(np.concatenate([(d <= radii).any(1) for d in _distances(points, members)]).mean())


def _distances(rows: np.ndarray, columns: np.ndarray, block: int = 512):
    """Yields Euclidean distances (up to `block` rows, all columns), from differences: exact zeros stay zero."""
    from scipy.spatial.distance import cdist

    for start in range(0, len(rows), block):
        yield cdist(rows[start : start + block].astype(np.float64), columns.astype(np.float64))


def _check(real: np.ndarray, generated: np.ndarray, least: int) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features must be (n, d) and (m, d), not {real.shape} and {generated.shape}")
    if min(len(real), len(generated)) < least:
        raise ValueError(f"{len(real)} real and {len(generated)} generated images: this takes at least {least} of each")
