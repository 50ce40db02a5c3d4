"""Our safetensors files against the safetensors library, both ways, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.fs import DamagedError, Store, StoreError
from plmsae_cli.store.tensorfile import _DTYPES, TensorFile, write_tensors

STORE = Store()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits: NaNs and infinities of floats included."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits % 2 if dtype == torch.bool else bits).view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensor_sets = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
    st.builds(random_tensor, st.sampled_from(list(_DTYPES.values())), shapes, st.integers(0, 99)),
    max_size=5,
)
metadata_sets = st.dictionaries(st.text("abc", max_size=3), st.text('xyz \n"é', max_size=5), max_size=3)


@given(tensors=tensor_sets, metadata=metadata_sets)
@settings(deadline=None, max_examples=60)
def test_ours_is_read_by_the_library(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with TemporaryDirectory() as folder:
        path = f"{folder}/x.safetensors"
        record = write_tensors(STORE, path, tensors, metadata)
        assert record == STORE.hash(path)
        loaded = safetensors.torch.load_file(path)
        assert loaded.keys() == tensors.keys()
        assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
        with safetensors.safe_open(path, "pt") as file:
            assert (file.metadata() or {}) == metadata
        raw = Path(path).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        for name, tensor in tensors.items():  # mapped files: every tensor is aligned
            first = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
            assert first % tensor.element_size() == 0


@given(tensors=tensor_sets, metadata=metadata_sets)
@settings(deadline=None, max_examples=60)
def test_the_librarys_is_read_by_ours(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with TemporaryDirectory() as folder:
        path = f"{folder}/x.safetensors"
        safetensors.torch.save_file(tensors, path, metadata or None)
        file = TensorFile(STORE, path)
        assert sorted(file.names()) == sorted(tensors)
        assert file.metadata == metadata
        for name, tensor in tensors.items():
            assert file.dtype(name) == tensor.dtype
            assert file.shape(name) == tuple(tensor.shape)
            assert same_bits(file.read(name), tensor)


@pytest.mark.parametrize("remote", [False, True])
def test_rows(remote: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store, path = STORE, str(tmp_path / "x.safetensors")
    if remote:
        server = request.getfixturevalue("s3")
        store, path = server.store(), server.url("deep", "x.safetensors")
    rows_RD = random_tensor(torch.bfloat16, (100, 7))
    lengths_R = torch.arange(100)
    write_tensors(store, path, {"rows": rows_RD, "lengths": lengths_R, "none": rows_RD[:0]})
    file = TensorFile(store, path)
    for start, stop in [(0, 100), (3, 4), (99, 100), (50, 50), (100, 100)]:
        assert same_bits(file.read("rows", start, stop), rows_RD[start:stop])
    assert same_bits(file.read("rows", 90), rows_RD[90:])
    out = torch.empty(10, 7, dtype=torch.bfloat16)
    file.read_into("rows", out[2:8], 20)
    assert same_bits(out[2:8], rows_RD[20:26])
    assert file.read("none").shape == (0, 7)
    assert same_bits(file.read("lengths", 5, 8), lengths_R[5:8])


def test_a_long_header_takes_a_second_read(tmp_path: Path) -> None:
    tensors = {f"{i:05}" * 20: torch.tensor([i]) for i in range(800)}
    write_tensors(STORE, str(tmp_path / "x"), tensors)
    file = TensorFile(STORE, str(tmp_path / "x"))
    assert all(file.read(name).item() == tensor.item() for name, tensor in tensors.items())


def test_strided_and_gradient_tensors_are_written(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).t(), "p": torch.nn.Parameter(torch.ones(3))}
    write_tensors(STORE, str(tmp_path / "x"), tensors)
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(same_bits(loaded[name], tensors[name].detach()) for name in tensors)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    write_tensors(STORE, path, {"a": torch.zeros(4, 3)})
    file = TensorFile(STORE, path)
    with pytest.raises(StoreError, match="has no tensor 'b'; it has a"):
        file.read("b")
    for start, stop in [(-1, 2), (3, 5), (5, 5)]:
        with pytest.raises(StoreError, match="has 4 rows"):
            file.read("a", start, stop)
    for out in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3)):
        with pytest.raises(StoreError, match=r"a is F32 \[4, 3\], which does not fill"):
            file.read_into("a", out)


def sound(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rebuilt(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_damaged_headers_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(STORE, str(path), {"a": torch.zeros(4, 3), "b": torch.zeros(2)})
    raw = path.read_bytes()
    header, data = sound(path)

    def changed(**fields: object) -> bytes:
        return rebuilt(header | {"a": header["a"] | fields}, data)

    damaged = {
        "empty": b"",
        "only a length": raw[:8],
        "header cut": raw[:30],
        "data cut": raw[:-1],
        "data too long": raw + b"\0",
        "huge length": b"\xff" * 8 + raw[8:],
        "no JSON": rebuilt(b"{" * 40, data),
        "no UTF-8": rebuilt(b"\xff" * 40, data),
        "no object": rebuilt([1, 2], data),
        "entry no object": rebuilt(header | {"a": 3}, data),
        "metadata no object": rebuilt(header | {"__metadata__": 3}, data),
        "dtype": changed(dtype="F7"),
        "dtype list": changed(dtype=["F32"]),
        "shape": changed(shape=[4, 4]),
        "negative shape": changed(shape=[-4, -3]),
        "shape text": changed(shape="43"),
        "shape fractions": changed(shape=[4.0, 3.0]),
        "deep": rebuilt(b"[" * 60_000, data),
        "offsets outside": changed(data_offsets=[16, 64]),
        "offsets negative": changed(data_offsets=[-48, 0]),
        "offsets three": changed(data_offsets=[0, 8, 48]),
        "nothing": rebuilt({}, data),
    }
    for what, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"x\.safetensors is not a sound safetensors file") as caught:
            TensorFile(STORE, str(path))
        assert caught.value.hint, what


def test_a_missing_file_is_missing_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TensorFile(STORE, str(tmp_path / "x"))


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_a_tensor_file_or_an_error(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "x")
        path.write_bytes(data)
        try:
            TensorFile(STORE, str(path))
        except DamagedError:
            return
        safetensors.torch.load_file(path)  # what we take for sound, so does the library
