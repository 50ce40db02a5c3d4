"""State dicts of dictionary_learning (https://github.com/saprmarks/dictionary_learning) and of its descendants, InterPLM
(https://github.com/ElanaPearl/InterPLM) and SAEFold (https://github.com/johnyang101/reticular-sae).

A file's class is told by the names of its tensors. TopK and BatchTopK have the same: settings beside the file, or the
user, say which.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.dictionaries.matrices import Matrices
from plmsae_cli.sae.dictionary import Dictionary

_LINEAR = frozenset({"encoder.weight", "encoder.bias", "decoder.weight"})
_PLAIN = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
_GATED = frozenset({"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"})
_INTERPLM = frozenset({"activation_rescale_factor", "normalize_to_sqrt_d"})


def from_tensors(state: Mapping[str, Tensor], selection: str | None, k: int | None) -> Dictionary:
    """The model of raw activations.

    Args:
        selection: `topk` or `batch_topk`, of a dictionary with k.
        k: where no tensor holds it.

    Raises:
        UserError: a kind that is not read, or one that cannot be told.
    """
    if bool(state.get("normalize_to_sqrt_d", torch.tensor(False))):
        raise UserError(
            "it gives every residue the length sqrt(d) first (normalize_to_sqrt_d), which is not supported",
            "dictionaries of activations as they are can be read",
        )
    model = _model(state, frozenset(state) - _INTERPLM, selection, k)
    if "activation_rescale_factor" in state and not bool((state["activation_rescale_factor"] == 1).all()):
        # Latents were scaled by the norms of their rows, and so are their maxima.
        norms_N = torch.linalg.vector_norm(_decoder(state), dim=1) / torch.linalg.vector_norm(model.w_dec_ND, dim=1)
        model.maximum_N.copy_(state["activation_rescale_factor"].float() * norms_N.nan_to_num(1.0))
    return model


def _decoder(state: Mapping[str, Tensor]) -> Tensor:
    return (state["decoder.weight"].T if "decoder.weight" in state else state["W_dec"]).float()


def _model(state: Mapping[str, Tensor], names: frozenset[str], selection: str | None, k: int | None) -> Dictionary:
    if names == _LINEAR | {"bias"}:
        return _linear(state, "bias", centred=True).relu()
    if names == _LINEAR | {"decoder.bias"}:
        return _linear(state, "decoder.bias", centred=False).relu()
    if names == _LINEAR | {"decoder.bias", "threshold"}:
        return _linear(state, "decoder.bias", centred=False).jump_relu(state["threshold"])
    if names == _PLAIN | {"threshold"}:
        return _plain(state, centred=False).jump_relu(state["threshold"])
    if names == _PLAIN | {"k", "threshold", "group_sizes"}:
        groups = [int(size) for size in state["group_sizes"]]
        return _plain(state, centred=True).batch_top_k(int(state["k"]), state["threshold"], groups)
    if names == _GATED:
        weights = _matrices(state, state["gate_bias"], state["decoder_bias"], centred=True)
        return weights.gated(state["r_mag"], state["mag_bias"])
    if names - {"k", "threshold"} == _LINEAR | {"b_dec"}:
        return _with_k(_linear(state, "b_dec", centred=True), state, selection, k)
    raise UserError(
        f"a dictionary with the tensors {', '.join(sorted(names)) or '(none)'} is not one that is read",
        "AutoEncoder, TopK, BatchTopK, Matryoshka BatchTopK, JumpReLU and Gated are",
    )


def _with_k(weights: Matrices, state: Mapping[str, Tensor], selection: str | None, k: int | None) -> Dictionary:
    if "k" in state:
        k = int(state["k"])
    if k is None:
        raise UserError("how many latents are active (k) is neither in the file nor in a config.json beside it")
    if selection is None:
        raise UserError(
            "TopK and BatchTopK cannot be told apart by their tensors, and no settings lie beside it",
            "add selection: topk or batch_topk to train.imported",
        )
    if selection == "topk":
        return weights.top_k(k)
    if "threshold" not in state:
        raise UserError("a BatchTopK dictionary without its threshold is not supported", "was it saved by a newer one?")
    return weights.batch_top_k(k, state["threshold"])


def _matrices(state: Mapping[str, Tensor], b_enc_N: Tensor, b_dec_D: Tensor, centred: bool) -> Matrices:
    return Matrices(state["encoder.weight"], b_enc_N, state["decoder.weight"].T, b_dec_D, centred)


def _linear(state: Mapping[str, Tensor], bias: str, centred: bool) -> Matrices:
    return _matrices(state, state["encoder.bias"], state[bias], centred)


def _plain(state: Mapping[str, Tensor], centred: bool) -> Matrices:
    return Matrices(state["W_enc"].T, state["b_enc"], state["W_dec"], state["b_dec"], centred)
