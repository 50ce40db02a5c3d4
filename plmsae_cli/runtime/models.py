"""A language model from its weights: the store's plain data and the model's maths put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.plm.cost import Config
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.rotary import inverse_frequencies
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_config import UNetConfig
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import WeightsInfo, load_state, resolve_weights


def load_plm(
    weights: str | WeightsInfo,
    store: Store | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ESM2 | UNet:
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
    config = model_config(info)
    state.setdefault("rotary.inv_freq", inverse_frequencies(config.head_dim))
    # Without memory of its own until the loaded tensors take their places: no second copy of a large model.
    with shapes_alone():
        model = build_model(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{info.path} does not fit its configuration: {first_line(error)}") from error
    return model.to(device=device, dtype=dtype).eval()


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within, modules are made with parameters that have a shape, and neither memory nor values."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves aside what torch would import its compiler for where there is no memory: two seconds of each process."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **{**kwargs, "device": "cpu"} if func is torch.arange else kwargs)


def model_config(info: WeightsInfo) -> Config:
    """The shape of the model. Raises UserError where it is none."""
    try:
        return UNetConfig(**info.config) if info.config.get("architecture") == "unet" else ESM2Config(**info.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{info.path}: {error}") from error


def build_model(config: Config) -> ESM2 | UNet:
    """A model of this shape, its weights yet to be loaded or drawn (`init_weights`)."""
    return UNet(config) if isinstance(config, UNetConfig) else ESM2(config)


def arithmetic(model: ESM2 | UNet, compute: torch.dtype) -> AbstractContextManager[object]:
    """Around forward passes: products in `compute`, whatever the parameters are in.

    Autocast would leave a UNet's values wider than its queries, which not every kernel of attention takes.
    """
    if isinstance(model, UNet):
        model.compute = compute
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, compute, enabled=compute != torch.float32)
