"""A language model from its weights: the store's plain data and the model's maths put together."""

from __future__ import annotations

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.rotary import inverse_frequencies
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import WeightsInfo, load_state, resolve_weights


def load_plm(
    weights: str | WeightsInfo,
    store: Store | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ESM2:
    """The model in evaluation mode, its parameters in `dtype` on `device`.

    Args:
        weights: what `model.weights` may be (see `resolve_weights`), or weights already resolved.
        store: where paths are read from; by default local files, and S3 with the environment's credentials.
        device: where the model lives and its inputs must be, as torch names it: `cpu`, `cuda`, `cuda:1`.
        dtype: of the parameters.

    Raises:
        UserError: the weights cannot be found, are damaged, or do not fit their configuration.
    """
    info = resolve_weights(weights, store or Store()) if isinstance(weights, str) else weights
    state = load_state(info)
    try:
        config = ESM2Config(**info.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{info.path}: {error}") from error
    state.setdefault("rotary.inv_freq", inverse_frequencies(config.head_dim))
    # Without memory of its own until the loaded tensors take their places: no second copy of a large model.
    with torch.device("meta"):
        model = ESM2(config)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval()
