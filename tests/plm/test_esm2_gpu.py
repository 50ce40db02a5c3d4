"""The same model on CUDA: the variable-length kernel against the loop in fp32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import MASK, encode, pack
from plmsae_cli.plm.attention import attention, attention_backend
from plmsae_cli.plm.esm2 import ESM2, ESM2Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Pair = tuple[torch.nn.Module, ESM2]
GATES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """The fp32 gate is for fp32 arithmetic, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def copy_of(model: ESM2) -> ESM2:
    copy = ESM2(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs.cpu().double()).norm() / theirs.double().norm().cpu())


@pytest.mark.parametrize("config", [ESM2Config(6, 96, 6), ESM2Config(3, 192, 8), ESM2Config(3, 256, 2)])
@pytest.mark.parametrize("dtype", GATES)
@torch.no_grad()
def test_every_layer_is_within_the_gate_of_the_cpu(
    pair: Callable[..., Pair], proteins: list[str], dtype: torch.dtype, config: ESM2Config
) -> None:
    _, model = pair(config)
    packed = pack([encode(s) for s in proteins])
    tokens_T = packed.tokens_T.clone()
    tokens_T[40:60] = MASK
    layers = range(config.num_layers + 1)
    reference = model(tokens_T, packed.documents, layers=layers, logits=True)
    on_gpu = packed.to("cuda")
    result = copy_of(model).to("cuda", dtype)(tokens_T.cuda(), on_gpu.documents, layers=layers, logits=True)
    errors = {k: relative(result.hidden[k], reference.hidden[k]) for k in layers}
    print(dtype, config.head_dim, {k: f"{error:.1e}" for k, error in errors.items()})
    assert max(errors.values()) <= GATES[dtype]
    assert relative(result.logits, reference.logits) <= GATES[dtype]


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs sm80")
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_and_its_gradients_are_the_loops(dtype: torch.dtype, head_dim: int) -> None:
    packed = pack([encode("M" * n) for n in (1, 300, 300, 17, 1022)], num_documents=8).to("cuda")
    assert attention_backend(torch.device("cuda", 0), dtype, head_dim) == "varlen"
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (len(packed.tokens_T), 4, head_dim)
    q, k, v, weights = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(4))
    half = [x.clone().requires_grad_() for x in (q, k, v)]
    full = [x.float().requires_grad_() for x in (q, k, v)]
    fast, slow = attention(*half, *packed.documents), attention(*full, *packed.documents)
    fast_grads = torch.autograd.grad(fast, half, weights)
    slow_grads = torch.autograd.grad(slow, full, weights.float())
    for mine, exact in zip((fast, *fast_grads), (slow, *slow_grads), strict=True):
        assert relative(mine.detach(), exact.detach()) <= GATES[dtype]


def test_gradients_under_autocast_are_those_of_the_cpu_in_fp32(pair: Callable[..., Pair], proteins: list[str]) -> None:
    _, model = pair(ESM2Config(3, 128, 4))
    packed = pack([encode(s) for s in proteins])
    weights = torch.randn(len(packed.tokens_T), 33, generator=torch.Generator().manual_seed(1))
    on_gpu = copy_of(model).to("cuda")
    (model(packed.tokens_T, packed.documents, logits=True).logits * weights).sum().backward()
    there = packed.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        logits = on_gpu(there.tokens_T, there.documents, logits=True).logits
    (logits.float() * weights.cuda()).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in on_gpu.named_parameters():
        if parameter.ndim == 2:
            assert parameter.grad.dtype == torch.float32
            assert relative(parameter.grad, expected[name].grad) <= 4e-2, name


def test_nothing_waits_for_the_device(pair: Callable[..., Pair], proteins: list[str]) -> None:
    """Both kernels' paths, with the lengths known to the host."""
    _, model = pair(ESM2Config(3, 128, 4))
    packed = pack([encode(s) for s in proteins]).to("cuda")
    for dtype in GATES:
        on_gpu = copy_of(model).to("cuda", dtype)
        on_gpu(packed.tokens_T, packed.documents, layers=[3], logits=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu(packed.tokens_T, packed.documents, layers=[3], logits=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs sm80")
@torch.no_grad()
def test_compiled_it_is_one_graph_for_all_packs_of_a_shape(pair: Callable[..., Pair], proteins: list[str]) -> None:
    config = ESM2Config(3, 128, 4)
    _, model = pair(config)
    on_gpu = copy_of(model).to("cuda", torch.bfloat16)
    compiled = torch.compile(on_gpu, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    for chosen in (proteins, proteins[3:], proteins[::2]):
        packed = pack([encode(s) for s in chosen], num_tokens=2048, num_documents=16, max_len=1024).to("cuda")
        documents = packed.documents._replace(lengths=None)
        with torch.compiler.set_stance("default" if chosen is proteins else "fail_on_recompile"):
            result = compiled(packed.tokens_T, documents, layers=[2], logits=True)
        used = sum(len(s) + 2 for s in chosen)
        reference = model(packed.tokens_T.cpu(), packed.to("cpu").documents, layers=[2], logits=True)
        assert relative(result.hidden[2][:used], reference.hidden[2][:used]) <= 2e-2
        assert relative(result.logits[:used], reference.logits[:used]) <= 2e-2
