"""The training stream against the plainest readers of the same blocks, in one run.

    python benchmarks/data_stream.py cache [--gb 8]            # page cache; plain threaded preads, litdata's loader
    python benchmarks/data_stream.py s3 [--gb 2] [--delay-ms 50] [--endpoint URL]   # obstore's ranges, aiohttp where installed
    python benchmarks/data_stream.py gpu [--gb 8]              # page cache to the GPU; pinned copies alone; a 5 GB/s consumer

Sides take turns and the best of `--turns` counts. `--record` adds the lines to results.jsonl. Without `--endpoint` the
server is a process that sends files from the page cache; with `--delay-ms` every request passes a proxy that holds it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import add, busy, cpu, stamp

from plmsae_cli.config.experiment import Storage
from plmsae_cli.store.blocks import HEADER_BYTES, Blocks, chunk_name, write_chunk, write_index
from plmsae_cli.store.fs import Store, join
from plmsae_cli.training.litdata_stream import LitDataStream
from plmsae_cli.training.stream import BlockStream

ROWS, D, CHUNK_ROWS = 8192, 1280, 8192 * 16
BLOCK_BYTES = ROWS * D * 2
RANGE, REQUESTS = 5 << 20, 32
BUCKET = "stream-benchmark"
Sides = dict[str, Callable[[], "int | tuple[int, float]"]]
"""Who -> one pass, which returns the bytes it read, and the seconds if not all of its time counts."""


def make(store: Store, folder: str, size: int) -> Blocks:
    """A dataset of about `size` bytes of bfloat16 rows; no two of its blocks are alike."""
    num_blocks = max(4, size // BLOCK_BYTES)
    rows_RD = torch.randint(-30000, 30000, (CHUNK_ROWS, D), dtype=torch.int16).view(torch.bfloat16)
    names, counts = [], []
    for first in range(0, num_blocks * ROWS, CHUNK_ROWS):
        counts.append(min(CHUNK_ROWS, num_blocks * ROWS - first))
        names.append(chunk_name(len(names)))
        rows_RD.view(torch.int16)[:, 0] = len(names)
        write_chunk(store, join(folder, names[-1]), rows_RD[: counts[-1]])
    write_index(store, folder, names, counts, D, torch.bfloat16)
    return Blocks(store, folder)


def ours(blocks: Blocks, device: str = "cpu") -> Callable[[], tuple[int, float]]:
    def run() -> tuple[int, float]:
        # In its stride: what was begun before the first step that counts makes up for what is begun and not counted.
        with BlockStream(blocks, ROWS, seed=0, device=device) as stream:
            steps = stream.steps_per_epoch
            warm = min(steps, 2 * len(stream._free))
            begin = 0.0
            for step in range(warm + steps):
                if step == warm:
                    begin = time.perf_counter()
                stream.rows(step)
            if device != "cpu":
                torch.cuda.synchronize()
            return steps * BLOCK_BYTES, time.perf_counter() - begin

    return run


def preads(blocks: Blocks, threads: int) -> Callable[[], int]:
    """Threads that fill a buffer each, block after block, from files that are open already."""
    files = sorted(Path(blocks.folder).glob("chunk-*"), key=lambda path: int(path.stem.rpartition("-")[2]))
    opened = [os.open(path, os.O_RDONLY) for path in files]
    steps = blocks.num_rows // ROWS
    buffers = [memoryview(torch.zeros(BLOCK_BYTES, dtype=torch.uint8).numpy()) for _ in range(threads)]

    def run() -> int:
        def work(first: int) -> None:
            buffer = buffers[first]
            for step in range(first, steps, threads):
                chunk, block = divmod(step, CHUNK_ROWS // ROWS)
                got = os.preadv(opened[chunk], [buffer], HEADER_BYTES + block * BLOCK_BYTES)
                assert got == BLOCK_BYTES

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        return steps * BLOCK_BYTES

    return run


def litdata(blocks: Blocks) -> Callable[[], int]:
    def run() -> int:
        with LitDataStream(blocks, CHUNK_ROWS, ROWS) as stream:
            for step in range(stream.steps_per_epoch):
                stream.rows(step)
            return stream.steps_per_epoch * BLOCK_BYTES

    return run


def ranges(blocks: Blocks, store: Store) -> list[tuple[str, int, int]]:
    """Key, start and stop of every range of the dataset."""
    found = []
    for path in blocks._paths:
        size = store.size(path)
        key = path.removeprefix(f"s3://{BUCKET}/")
        found += [(key, first, min(first + RANGE, size)) for first in range(0, size, RANGE)]
    return found


def obstore_ranges(wanted: list[tuple[str, int, int]], endpoint: str) -> Callable[[], int]:
    import obstore
    from obstore.store import S3Store

    client = S3Store(
        BUCKET, endpoint=endpoint, region="us-east-1", skip_signature=True, client_options={"allow_http": True}
    )

    def run() -> int:
        with ThreadPoolExecutor(REQUESTS) as pool:
            sizes = pool.map(lambda r: len(obstore.get_range(client, r[0], start=r[1], end=r[2])), wanted)
            return sum(sizes)

    return run


def aiohttp_ranges(wanted: list[tuple[str, int, int]], endpoint: str) -> Callable[[], int]:
    import aiohttp  # type: ignore[import-not-found]

    async def fetch_all() -> int:
        limit = asyncio.Semaphore(REQUESTS)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=REQUESTS)) as session:

            async def fetch(key: str, start: int, stop: int) -> int:
                headers = {"Range": f"bytes={start}-{stop - 1}"}
                async with limit, session.get(f"{endpoint}/{BUCKET}/{key}", headers=headers) as answer:
                    return len(await answer.read())

            return sum(await asyncio.gather(*(fetch(*one) for one in wanted)))

    return lambda: asyncio.run(fetch_all())


def best(sides: Sides, turns: int) -> dict[str, float]:
    """Bytes a second of each side's best turn."""
    found = dict.fromkeys(sides, 0.0)
    for _ in range(turns):
        for who, run in sides.items():
            begin = time.perf_counter()
            outcome = run()
            size, seconds = outcome if isinstance(outcome, tuple) else (outcome, time.perf_counter() - begin)
            found[who] = max(found[who], size / seconds)
            print(f"{who}: {found[who] / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
    return found


def from_cache(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    blocks = make(Store(), str(folder), int(options.gb * 1e9))
    sides: Sides = {"plmsae": ours(blocks)}
    sides |= {f"preads, {n} threads": preads(blocks, n) for n in (2, 4, 5)}
    if find_spec("litdata"):
        sides["litdata, in process"] = litdata(blocks)
    sides["plmsae"]()  # brings the files into the page cache
    found = best(sides, options.turns)
    top = max((value, who) for who, value in found.items() if who.startswith("preads"))
    notes = {"plmsae": f"{found['plmsae'] / top[0]:.0%} of plain preads"}
    kept = {who: value for who, value in found.items() if not who.startswith("preads")} | {
        "limit (threaded preads)": top[0]
    }
    return {who: (value, notes.get(who, top[1] if "limit" in who else "")) for who, value in kept.items()}


async def serve(port: int, folder: Path) -> None:
    """As much of S3 as reading needs: GET and HEAD of `/bucket/key`, whole or by range, for anybody; files go out by sendfile."""
    loop = asyncio.get_running_loop()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                method, path, _ = head.split(" ", 2)
                file = folder / path.partition("?")[0].removeprefix(f"/{BUCKET}/")
                if not file.is_file():
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                size = file.stat().st_size
                match = re.search(r"(?i)^range: bytes=(\d+)-(\d+)", head, re.MULTILINE)
                first, last = (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)
                status = f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}" if match else "200 OK"
                writer.write(
                    f'HTTP/1.1 {status}\r\nContent-Length: {last + 1 - first}\r\nETag: "{size}"\r\n'
                    "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n".encode()
                )
                await writer.drain()
                if method == "GET":
                    with file.open("rb") as opened:
                        await loop.sendfile(writer.transport, opened, first, last + 1 - first)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(one, "127.0.0.1", port)
    async with listening:
        await listening.serve_forever()


def serve_files(port: int, folder: Path) -> None:
    """`serve`, as the target of `process`."""
    asyncio.run(serve(port, folder))


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[str]:
    """Address of a server in a process of its own; `target` gets the port and the arguments."""
    port = free_port()
    running = get_context("spawn").Process(target=target, args=(port, *arguments), daemon=True)
    running.start()
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.kill()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def delay(port: int, behind: str, seconds: float) -> None:
    """Pass bytes on; those of a request are held for `seconds`, those of an answer are not."""
    host, _, its_port = behind.removeprefix("http://").partition(":")

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        its_reader, its_writer = await asyncio.open_connection(host, int(its_port), limit=1 << 20)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, hold: float) -> None:
            try:
                while data := await source.read(1 << 20):
                    await asyncio.sleep(hold)
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pass_on(reader, its_writer, seconds), pass_on(its_reader, writer, 0.0))

    listening = await asyncio.start_server(one, "127.0.0.1", port, limit=1 << 20)
    async with listening:
        await listening.serve_forever()


def _serve_delay(port: int, behind: str, seconds: float) -> None:
    asyncio.run(delay(port, behind, seconds))


def from_s3(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    size = int(options.gb * 1e9)
    with ExitStack() as servers:
        if options.endpoint:
            near = options.endpoint
            make_public(near, size)
        else:
            make(Store(), str(folder / "data"), size)
            near = servers.enter_context(process(serve_files, folder))
        address = near
        if options.delay_ms:
            address = servers.enter_context(process(_serve_delay, near, options.delay_ms / 1e3))
        store = Store(Storage(endpoint_url=address, allow_http=True, anonymous=True))
        blocks = Blocks(store, f"s3://{BUCKET}/data")
        wanted = ranges(blocks, store)
        sides: Sides = {"plmsae": ours(blocks), "obstore": obstore_ranges(wanted, address)}
        if find_spec("aiohttp"):
            sides["aiohttp"] = aiohttp_ranges(wanted, address)
        found = best(sides, options.turns)
    top = max(value for who, value in found.items() if who != "plmsae")
    what = f"ranges of 5 MB, {REQUESTS} in flight"
    return {
        who: (value, f"{value / top:.0%} of the best client" if who == "plmsae" else what)
        for who, value in found.items()
    }


def make_public(endpoint: str, size: int) -> None:
    """The dataset in a bucket of a real server, for anybody to read; credentials are those of the environment."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    writer = Store(Storage(endpoint_url=endpoint, allow_http=True))
    make(writer, f"s3://{BUCKET}/data", size)
    for name in writer.list(f"s3://{BUCKET}/data"):
        client.put_object_acl(Bucket=BUCKET, Key=f"data/{name}", ACL="public-read")


def to_gpu(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    blocks = make(Store(), str(folder), int(options.gb * 1e9))
    ours(blocks)()
    steps = blocks.num_rows // ROWS

    def pinned() -> int:
        """Copies from one pinned buffer, one after the other, with nothing read."""
        host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
        for _ in range(steps):
            device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return steps * BLOCK_BYTES

    found = best({"plmsae": ours(blocks, "cuda"), "limit (pinned copies alone)": pinned}, options.turns)
    share, pace = consumer(blocks, 5e9)
    note = f"a consumer of {pace / 1e9:.2f} GB/s waits {share:.2%} of the time"
    return {who: (value, note if who == "plmsae" else "") for who, value in found.items()}


def consumer(blocks: Blocks, bytes_per_second: float) -> tuple[float, float]:
    """Share of waiting, and pace, of a trainer whose kernels take as long as that rate gives a block."""
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    wanted = BLOCK_BYTES / bytes_per_second
    cycles = int(cycles * wanted / (time.perf_counter() - begin))
    with BlockStream(blocks, ROWS, seed=0, device="cuda") as stream:
        total = torch.zeros((), device="cuda")
        stream.rows(0)
        waited, begin = stream.wait_seconds, time.perf_counter()
        for step in range(1, stream.steps_per_epoch):
            total += stream.rows(step)[0, 0].float()
            torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return (stream.wait_seconds - waited) / seconds, (stream.steps_per_epoch - 1) * BLOCK_BYTES / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cache", "s3", "gpu"))
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--cores", type=int, default=2, help="cores that the readers and the S3 server may use; not of `gpu`"
    )
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--endpoint", help="an S3 server; credentials are those of the environment")
    parser.add_argument("--called", default="", help="its name, for the lines")
    parser.add_argument(
        "--folder", type=Path, help="where blocks are written; a temporary folder of the system by default"
    )
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.part != "gpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    folder, beside = Path(tempfile.mkdtemp(dir=options.folder)), busy()
    run: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "cache": from_cache, "s3": from_s3, "gpu": to_gpu,
    }  # fmt: skip
    try:
        found = run[options.part](options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    suffix = f"-{options.called}" if options.called else ""
    suffix += f"-{options.delay_ms:g}ms" if options.delay_ms else ""
    device = torch.cuda.get_device_name() if options.part == "gpu" else cpu(options.cores)
    shared = stamp(f"data-stream-{options.part}", device, f"python benchmarks/data_stream.py {' '.join(sys.argv[1:])}")
    size = f"{options.gb:g} GB of blocks [{ROWS}, {D}] in bfloat16" + (f"; {beside}" if beside else "")
    lines: list[dict[str, Any]] = [
        {"name": f"data/stream-{options.part}{suffix}", "who": who, "value": round(value / 1e9, 3), "unit": "GB/s",
         "note": f"{size}; {note}" if note else size, **shared}
        for who, (value, note) in found.items()
    ]  # fmt: skip
    for line in lines:
        print(f"{line['who']:30} {line['value']:8.3f} {line['unit']}  {line['note']}")
    if options.record:
        add(Path(__file__).with_name("results.jsonl"), lines)


if __name__ == "__main__":
    main()
