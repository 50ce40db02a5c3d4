"""The decoder map: latents as points of a plane, near where their decoder rows are alike, and clusters of them.

Letters: N latents, D dimensions of the layer, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
CLUSTERS = 8
"""As many as there are colours that people with any kind of colour vision tell apart."""
ROUNDS = 50


@dataclass(frozen=True)
class Layout:
    """A place and a cluster for each latent."""

    place_N2: Floats
    """Each axis from 0 to 1."""
    cluster_N: npt.NDArray[np.int64]
    """From 0, largest cluster first."""


def arrange(w_dec_ND: Floats) -> Layout:
    """The first two principal components of the decoder rows, and k-means on the sphere. Deterministic.

    Components have the sign that makes their largest loading positive. The k-means (cosine, Dhillon and Modha 2001) starts
    from the row farthest from the mean, and then from the row farthest from those chosen.
    """
    rows_ND = w_dec_ND.astype(np.float64)
    rows_ND /= np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
    centred_ND = rows_ND - rows_ND.mean(0)
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    axes_D2 = vectors_DD[:, ::-1][:, :2]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(0), range(axes_D2.shape[1])])
    place_N2 = centred_ND @ axes_D2
    low_2, high_2 = place_N2.min(0), place_N2.max(0)
    place_N2 = (place_N2 - low_2) / np.maximum(high_2 - low_2, 1e-12)
    return Layout(place_N2.astype(np.float32), _spherical(rows_ND, min(CLUSTERS, len(rows_ND))))


def _spherical(rows_ND: npt.NDArray[np.float64], clusters: int) -> npt.NDArray[np.int64]:
    chosen = [int((rows_ND @ rows_ND.mean(0)).argmin())]
    nearest_N = rows_ND @ rows_ND[chosen[0]]
    while len(chosen) < clusters:
        chosen.append(int(nearest_N.argmin()))
        nearest_N = np.maximum(nearest_N, rows_ND @ rows_ND[chosen[-1]])
    centre_KD = rows_ND[chosen]
    cluster_N = np.full(len(rows_ND), -1)
    for _ in range(ROUNDS):
        before_N, cluster_N = cluster_N, (rows_ND @ centre_KD.T).argmax(1)
        if (before_N == cluster_N).all():
            break
        for k in range(clusters):
            if (mine_N := cluster_N == k).any():
                total_D = rows_ND[mine_N].sum(0)
                centre_KD[k] = total_D / max(float(np.linalg.norm(total_D)), 1e-12)
    order = np.argsort(-np.bincount(cluster_N, minlength=clusters), kind="stable")
    rank_K = np.empty(clusters, dtype=np.int64)
    rank_K[order] = np.arange(clusters)
    ranked_N: npt.NDArray[np.int64] = rank_K[cluster_N]
    return ranked_N
