"""The seam against attention written out with a block-diagonal mask in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plmsae_cli.plm.attention import Documents, attention, attention_backend, constant


def documents(lengths: list[int]) -> Documents:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Documents(cu_seqlens, max(lengths, default=0), tuple(lengths))


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """softmax over the whole stream with the other documents masked out."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(document_T[:, None] != document_T, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(0, 2**31))
def test_each_document_attends_to_itself_alone(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, sum(lengths), 2, 4, generator=generator, dtype=torch.float64)
    got = attention(q, k, v, *documents(lengths))
    torch.testing.assert_close(got, dense(q, k, v, lengths), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_dense_form() -> None:
    lengths = [3, 3, 1, 0, 7, 3]
    inputs = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(lengths), 2, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((attention(*inputs, *documents(lengths)) * weights).sum(), inputs)
    (theirs,) = torch.autograd.grad((dense(*inputs, lengths) * weights).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_lengths_may_be_left_out() -> None:
    lengths = [4, 4, 2]
    q, k, v = torch.randn(3, 10, 2, 8)
    full = documents(lengths)
    without = attention(q, k, v, *full._replace(lengths=None))
    assert torch.equal(without, attention(q, k, v, *full))


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.data())
def test_documents_know_the_place_of_every_token(lengths: list[int], data: st.DataObject) -> None:
    document_T, position_T = documents(lengths).locate(sum(lengths))
    expected = [(i, j) for i, length in enumerate(lengths) for j in range(length)]
    assert list(zip(document_T.tolist(), position_T.tolist(), strict=True)) == expected
    flags = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    counts = documents(lengths).per_document(torch.tensor(flags, dtype=torch.bool)).tolist()
    assert counts == [
        sum(f for f, d in zip(flags, document_T.tolist(), strict=True) if d == i) for i in range(len(lengths))
    ]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, "tiles"),
        ((8, 0), torch.float16, 16, "tiles"),
        ((9, 0), torch.bfloat16, 24, "varlen"),
        ((7, 5), torch.float16, 64, "sdpa"),
        ((9, 0), torch.float32, 64, "sdpa"),
        ((9, 0), torch.bfloat16, 20, "sdpa"),
    ],
)
def test_the_kernel_follows_device_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
) -> None:
    from plmsae_cli.plm import attention as module

    module._varlen_capable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(module, "find_spec", lambda name: name)  # as if triton were there
    assert attention_backend(torch.device("cuda", 0), dtype, head_dim) == expected
    assert attention_backend(torch.device("cpu"), dtype, head_dim) == "sdpa"
    monkeypatch.setattr(module, "_forgone", True)  # ours do not compile there: torch's take their place
    without = "varlen" if expected == "tiles" else expected
    assert attention_backend(torch.device("cuda", 0), dtype, head_dim) == without
    module._varlen_capable.cache_clear()


def test_constants_are_marked_for_the_compiler_as_it_marks_them() -> None:
    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    torch.compiler.assume_constant_result(theirs)
    assert constant(ours).__dict__ == theirs.__dict__ != {}
