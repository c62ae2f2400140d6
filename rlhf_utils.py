"""Full-precision weights go over the wire; an FP8 vLLM engine quantizes them on arrival.

    trainer   rank 0       WeightSender.send()                packs buckets, broadcasts them and their digests
    engine    ranks 1..TP  WorkerExtension.receive_weights()  quantizes into the live tensors, compares digests

vLLM adds `WorkerExtension` to each of its workers (`worker_extension_cls="rlhf_utils.WorkerExtension"`); its methods
are called by name with `collective_rpc`. Four rules decide the code:

1. One reload session for a whole update, or a replay of the copies that it would make. `model.load_weights` outside a
   session rebuilds every layer that it touches from uninitialized memory: a call per parameter destroys a quantized model.
2. A rank never leaves a broadcast early (`use_all`). Whatever fails while loading is kept until the last bucket
   has come in; otherwise the sender waits for ever.
3. All ranks agree on errors (`agreed`). One reply too many in vLLM's executor is taken for the answer to the next call.
4. Nobody waits for another rank without a limit (`wait_on_host`), and whoever gives up says what it waited for.

vLLM is imported where it is used: the trainer process starts without it.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import NoneType
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torchao.quantization import Float8Tensor
from torchao.quantization.quantize_.workflows.float8 import float8_tensor
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)
IMPORTED_AT = time.time()
BUCKET_BYTES = 256 * 2**20
Manifest = list[list]  # [[name, dtype name such as "bfloat16", shape], ...] in the order of sending
Weights = list[tuple[str, torch.Tensor]]  # checkpoint names and full tensors, what vLLM's loaders take


# ----- The group: rank 0 is the trainer, ranks 1..TP are the engine's workers ----------------------------------------


class GlooGroup:
    """Broadcasts over TCP, for CPU tensors and, through host memory, for CUDA tensors."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, address: str, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        """Send `tensor` (contiguous, any dtype) from rank `src` to the same tensor of every other rank; blocks."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        data = as_bytes(tensor)
        host = data.cpu()  # `data` itself if that is on the CPU
        self.gloo.broadcast([host], options).wait()
        data.copy_(host)

    def destroy(self) -> None:
        """As NCCL's: end what has been begun. Here nothing outlives its call."""


def stateless_init_process_group(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    device: torch.device,
    backend: str | None = None,
    timeout_s: float = 60.0,
    listen_socket: socket.socket | None = None,
):
    """Join the weight-update group and return an object with `broadcast(tensor, src, stream=None)`.

    It leaves torch.distributed's default group alone, so it works inside a vLLM worker. Every rank must call it; rank 0
    serves the rendezvous on `master_address` only. What travels there is never unpickled.

    Args:
        device: where this rank's tensors live; without `backend`, CUDA means NCCL and CPU means gloo.
        backend: "nccl" or "gloo"; give it when the two ends differ (gloo is for a group with any CPU rank).
        timeout_s: seconds to wait for the other ranks, and for each broadcast (by `Buckets`: NCCL itself has no timeout).
        listen_socket: rank 0 may bring a socket that listens already, so that no other program can take the port.

    Raises:
        TimeoutError: which ranks did not arrive in time.
        OSError: rank 0 cannot listen there (is the port taken?).
        RuntimeError: NCCL is off or cannot be loaded (vLLM's communicator would then do nothing, silently).
    """
    device, timeout = torch.device(device), timedelta(seconds=timeout_s)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # NCCL wants to know which
    serve = {}
    if rank == 0:
        listen_socket = listen_socket or socket.create_server((master_address, master_port))
        serve = {"master_listen_fd": listen_socket.detach()}
    where, options = f"{master_address}:{master_port}", dict(wait_for_workers=False, use_libuv=False, **serve)
    try:
        store = dist.TCPStore(master_address, master_port, None, rank == 0, timeout, **options)
    except dist.DistNetworkError as error:
        raise TimeoutError(f"rank {rank} found no rank 0 at {where} in {timeout_s:g} s") from error
    store.set(f"joined/{rank}", "")
    try:
        store.wait([f"joined/{other}" for other in range(world_size)], timeout)
    except dist.DistStoreError as error:
        missing = [other for other in range(world_size) if not store.check([f"joined/{other}"])]
        raise TimeoutError(f"rank {rank} waited {timeout_s:g} s at {where} in vain for ranks {missing}") from error
    if (backend or ("nccl" if device.type == "cuda" else "gloo")) == "gloo":
        with socket.create_connection((master_address, master_port), timeout_s) as probe:
            own_address = probe.getsockname()[0]  # the address by which this rank reaches rank 0
        return GlooGroup(store, rank, world_size, own_address, timeout_s)

    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import unpinned_nccl_env

    if rank == 0:
        store.set("nccl_id", bytes(NCCLLibrary().ncclGetUniqueId().internal))
    with unpinned_nccl_env():  # the settings that vLLM pins for its workers are not the trainer's
        group = PyNcclCommunicator.from_unique_id_bytes(store.get("nccl_id"), rank, world_size, device)
    if group.disabled:
        raise RuntimeError(f"rank {rank}: NCCL is disabled in vLLM (is VLLM_DISABLE_PYNCCL set?), weights cannot flow")
    group.store, group.timeout_s = store, timeout_s  # the other ranks may still be reading the store
    return group


# ----- What travels: a manifest, buckets, digests. Both ends make the same plan from the same manifest. ---------------


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and saved buffers of a Hugging Face model, each once: a tied head goes by the embedding's name."""
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), (name, tensor))
    return dict(names.values())


def make_manifest(model: torch.nn.Module, dtype: torch.dtype) -> Manifest:
    """Name, wire dtype (`dtype`, the engine's, for every float weight) and shape of every weight, in sending order."""
    return [
        [name, dtype_name(dtype if weight.is_floating_point() else weight.dtype), list(weight.shape)]
        for name, weight in named_weights(model).items()
    ]


def find_nonfinite(model: torch.nn.Module) -> list[str]:
    """Names of the float weights that hold a NaN, or an infinity in BF16: one pass over all, one wait for the device."""
    weights = {name: weight for name, weight in named_weights(model).items() if weight.is_floating_point()}
    largest = torch.stack([norm.bfloat16() for norm in torch._foreach_norm(list(weights.values()), ord=math.inf)])
    return [name for name, finite in zip(weights, largest.isfinite().tolist(), strict=True) if not finite]


def check_manifest(manifest: Iterable[list], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise one ValueError that lists every missing, unexpected, duplicate, misshapen or non-float weight.

    `expected` has the shape of every weight of the engine's model by name.
    """
    seen, problems = set(), []
    for name, dtype, shape in manifest:
        if name in seen:
            problems.append(f"duplicate: {name}")
        elif name not in expected:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif tuple(shape) != expected[name]:
            problems.append(f"misshapen: {name} is {list(shape)}, the engine's model has {list(expected[name])}")
        if dtype not in ("bfloat16", "float16", "float32"):
            problems.append(f"dtype: {name} is {dtype!r}, expected a float type such as 'bfloat16'")
        seen.add(name)
    problems += [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in seen]
    if problems:
        raise ValueError(
            f"{len(problems)} weights do not fit the engine's model; send a model of the architecture and shapes that "
            "the engine was started with:\n  " + "\n  ".join(problems)
        )


class Piece(NamedTuple):
    """Rows of one weight in a bucket: which (`row` on, of `rows`), and where (offset and size in bytes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row: int
    rows: int
    offset: int
    nbytes: int

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The piece, as a view of its bucket (uint8)."""
        return bucket[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def plan_buckets(manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> list[tuple[int, list[Piece]]]:
    """Split a manifest into (size in bytes, pieces), filling each bucket; a weight may be cut between two rows.

    >>> plan = plan_buckets([["a", "bfloat16", [3]], ["b", "bfloat16", [5, 16]]], 128)
    >>> [(piece.name, piece.row, piece.shape, piece.offset) for piece in plan[0][1]]  # offsets are aligned to 16 bytes
    [('a', 0, (3,), 0), ('b', 0, (3, 16), 16)]
    >>> [(piece.name, piece.row, piece.shape, piece.offset) for piece in plan[1][1]]
    [('b', 3, (2, 16), 0)]
    """
    buckets: list[tuple[int, list[Piece]]] = []
    for name, dtype_name, shape in manifest:
        dtype, (rows, *rest) = getattr(torch, dtype_name), shape or [1]
        row_bytes, row = math.prod(rest) * dtype.itemsize, 0
        while row < rows:
            if not buckets or buckets[-1][0] + row_bytes > bucket_bytes:
                buckets.append((0, []))  # it holds one row at least, however large that is
            size, pieces = buckets.pop()
            count = min(rows - row, max(1, (bucket_bytes - size) // row_bytes))
            pieces.append(Piece(name, dtype, (count, *rest) if shape else (), row, rows, size, count * row_bytes))
            buckets.append((-(-(size + count * row_bytes) // 16) * 16, pieces))
            row += count
    return buckets


class Buckets:
    """Fixed memory for weights on their way: two buckets in turn, so that one travels while the other is worked on.

    Both ends work on buckets in the current stream and broadcast in a stream of their own (on the CPU both are
    nothing); the host waits for nothing until the end. Every rank raises TimeoutError, with the names of the weights, if
    a broadcast has made no progress for `group.timeout_s` seconds.
    """

    def __init__(self, manifest: Manifest, bucket_bytes: int, group, device: torch.device):
        self.manifest, self.plan, self.group = manifest, plan_buckets(manifest, bucket_bytes), group
        largest = max(size for size, _ in self.plan)
        memory = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in self.plan[:2]]
        self.buckets = [memory[i % 2][:size] for i, (size, _) in enumerate(self.plan)]
        self.pieces = [
            [(piece, piece.view(bucket)) for piece in pieces]
            for bucket, (_, pieces) in zip(self.buckets, self.plan, strict=True)
        ]
        self.digests = torch.zeros(len(self.plan), dtype=torch.int64, device=device)
        self.streams = torch.get_device_module(device)
        self.wire = self.streams.Stream(priority=-1)

    def names(self, number: int) -> str:
        """For messages: the bucket's number, its first and last weight."""
        if number == len(self.plan):
            return "the digests"
        pieces = self.plan[number][1]
        return f"bucket {number + 1} of {len(self.plan)} ({pieces[0].name} .. {pieces[-1].name})"

    def broadcast(self, number: int, tensor: torch.Tensor) -> None:
        """Bucket `number`, or the digests after the last, from rank 0 after all that the current stream has to do."""
        self.wire.wait_stream(self.streams.current_stream())
        self.events.append(self.streams.Event())
        with self.streams.stream(self.wire):
            broadcast(self.group, tensor, self.names(number), self.wire)
            self.events[number].record()

    def wait_on_host(self, number: int) -> None:
        """Until a broadcast has ended."""
        wait_on_host(self.events[number], self.group, self.names(number))

    def send(self, pack: Callable[[int], None]) -> int:
        """Rank 0: `pack(number)` fills each bucket before it goes; the digests come last. Returns how many buckets."""
        self.events = []
        for number, bucket in enumerate(self.buckets):
            if number > 1:
                self.events[number - 2].wait()  # it had the same memory
            if number > 0:  # between them, so that packing does not take the GPU just when the next broadcast starts
                self.digests[number - 1] = digest(self.buckets[number - 1])
            pack(number)
            self.broadcast(number, bucket)
        self.digests[-1] = digest(bucket)
        self.broadcast(len(self.buckets), self.digests)
        for number in range(len(self.events)):
            self.wait_on_host(number)
        return len(self.buckets)

    def receive(self) -> Iterator[int]:
        """Ranks 1..TP: yield the number of each bucket when it has come in, then compare with the sender's digests.

        The order of collectives is the sender's: every bucket, then the digests. Run it to the end, even after an error.
        Raises ValueError if a bucket differs from what was sent; it names the bucket's first and last weight.
        """
        self.events = []
        self.broadcast(0, self.buckets[0])
        for number, bucket in enumerate(self.buckets):
            if number + 1 < len(self.buckets):  # into the memory of the bucket before this one, which has been used
                self.broadcast(number + 1, self.buckets[number + 1])
            self.events[number].wait()
            self.digests[number] = digest(bucket)
            yield number
        sent = torch.empty_like(self.digests)
        self.broadcast(len(self.buckets), sent)
        for number in range(len(self.events)):
            self.wait_on_host(number)
        self.events[-1].wait()
        if wrong := (sent != self.digests).nonzero().flatten().tolist():
            names = ", ".join(map(self.names, wrong))
            raise ValueError(
                f"{len(wrong)} of {len(self.plan)} buckets came in with other bytes than were sent: {names}"
            )


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """64-bit checksum of a tensor's bytes, as an int64 scalar on its device: no copy to the host, no synchronization.

    The sum over i of (2i + 1) word_i modulo 2^64, of the bytes as 64-bit words. Any one changed word changes it, and so do
    two swapped ones unless distance times difference is a multiple of 2^63. It is meant for accidents, not attackers.
    """
    data = as_bytes(tensor.contiguous())
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = data.view(torch.int64)
    if words.is_cuda:
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        if words.numel():
            digest_kernel[(triton.cdiv(words.numel(), 4096),)](words, words.numel(), total, 4096, num_warps=8)
        return total
    columns = 256
    whole = words.numel() // columns * columns
    matrix_RC, rest = words[:whole].view(-1, columns), words[whole:]
    parts = (  # i = 256 r + c: sums of rows and of columns instead of a product as large as the tensor
        matrix_RC.sum(0) * (2 * torch.arange(columns) + 1),
        matrix_RC.sum(1) * (2 * columns * torch.arange(len(matrix_RC))),
        rest * (2 * (whole + torch.arange(len(rest))) + 1),
    )
    return sum(part.sum() for part in parts)


@triton.jit
def digest_kernel(words, count, total, BLOCK: tl.constexpr):
    """One program a block; sums of integers do not depend on their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + i, mask=i < count, other=0)
    tl.atomic_add(total, tl.sum(word * (2 * i + 1)))


def broadcast(group, tensor: torch.Tensor, what: str, stream=None) -> None:
    """Broadcast from rank 0; an error of gloo's, which waits here, says where it happened."""
    if getattr(group, "disabled", False):  # vLLM's communicator would do nothing, silently
        raise ConnectionError(f"rank {group.rank}, {what}: this group was given up after an error; join a new one")
    try:
        group.broadcast(tensor, src=0, stream=stream)
    except RuntimeError as error:
        raise ConnectionError(f"rank {group.rank}, {what}: {error}") from error


def wait_on_host(event, group, what: str) -> None:
    """Until a broadcast has ended; aborts and raises TimeoutError, where NCCL would wait for ever for a dead rank."""
    deadline = time.monotonic() + group.timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            group.destroy()  # NCCL's kernels would keep the GPU busy for ever
            raise TimeoutError(f"rank {group.rank}, {what}: no progress for {group.timeout_s:g} s")
        time.sleep(1e-4)


def announce(group, device: torch.device, sending: bool = True) -> bool:
    """Rank 0 tells the others whether weights follow; they call it with anything. Returns what rank 0 said."""
    streams, header = torch.get_device_module(device), torch.tensor([int(sending)], device=device)
    event = streams.Event()
    broadcast(group, header, "the announcement of weights", streams.current_stream())
    event.record()
    wait_on_host(event, group, "the announcement of weights")
    return bool(header.item())


class WeightSender:
    """Rank 0's end: casts and packs weights bucket by bucket into fixed memory and broadcasts them.

    Args:
        model: a Hugging Face model on `device`; its weights may change between two sends, not their manifest.
    """

    def __init__(self, model: torch.nn.Module, manifest: Manifest, group, device: torch.device, bucket_bytes: int):
        self.group, self.device, self.made_for = group, device, self._state(model, bucket_bytes)
        self.buckets, weights = Buckets(manifest, bucket_bytes, group, device), named_weights(model)
        self.sources = [
            [weights[p.name].detach().view(p.rows, -1)[p.row : p.row + (*p.shape, 1)[0]] for p, _ in pieces]
            for pieces in self.buckets.pieces
        ]
        self.targets = [
            [view.view_as(source) for (_, view), source in zip(pieces, sources, strict=True)]
            for pieces, sources in zip(self.buckets.pieces, self.sources, strict=True)
        ]

    @staticmethod
    def _state(model: torch.nn.Module, bucket_bytes: int) -> list:
        return [bucket_bytes, *((name, w.data_ptr(), w.shape, w.dtype) for name, w in named_weights(model).items())]

    def fits(self, model: torch.nn.Module, bucket_bytes: int) -> bool:
        """Are these the weights, in the same places, and the bucket size that both ends have agreed on?"""
        return self.made_for == self._state(model, bucket_bytes)

    def send(self) -> int:
        """Broadcast `announce`, every bucket, and at the end the digests of what was sent. Returns how many buckets."""
        announce(self.group, self.device)
        return self.buckets.send(lambda i: torch._foreach_copy_(self.targets[i], self.sources[i]))


class WholeWeights:
    """Copies pieces together and gives `use` each bucket's completed weights, in memory of their own."""

    def __init__(self, buckets: Buckets, use: Callable[[Weights], None]):
        self.buckets, self.use, self.unfinished = buckets, use, {}

    def __call__(self, number: int) -> None:
        """Bucket `number` is on its way; vLLM's loaders make the host wait in any case."""
        self.buckets.wait_on_host(number)
        whole = []
        for piece, view in self.buckets.pieces[number]:
            if piece.row == 0:
                shape = (piece.rows, *piece.shape[1:]) if piece.shape else ()
                self.unfinished[piece.name] = torch.empty(shape, dtype=view.dtype, device=view.device)
            rows = view.view(1, -1) if not piece.shape else view.view(piece.shape[0], -1)
            self.unfinished[piece.name].view(piece.rows, -1)[piece.row : piece.row + len(rows)] = rows
            if piece.row + len(rows) == piece.rows:
                whole.append((piece.name, self.unfinished.pop(piece.name)))
        self.use(whole)


def live_addresses(model: torch.nn.Module) -> list[int]:
    """Where the tensors are that a vLLM model computes with."""
    return [tensor.data_ptr() for parameter in model.parameters() for tensor in plain_tensors(parameter).values()]


def use_all(numbers: Iterator[int], use: Callable[[int], None]) -> int:
    """Call `use` with each bucket's number; after an error go on receiving, and raise it at the end. Returns how many."""
    failure, count = None, 0
    for number in numbers:
        count += 1
        try:
            if failure is None:
                use(number)
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure
    return count


# ----- The engine's side: load, quantize, repair, prove ---------------------------------------------------------------


class ReloadSession:
    """One update of a whole vLLM model in place: open it, `load` every weight once in any number of calls, close.

    The tensors keep their addresses, as captured CUDA graphs need. A session that failed is to be closed
    too (`complete=False`): the model can then be reloaded, but holds no valid weights until a session was complete.
    """

    def __init__(self, worker):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.worker, self.model = worker, worker.get_model()
        self.parameters = {name for name, _ in self.model.named_parameters()}
        self.received: Manifest = []
        self.loaded: set[str] = set()
        with self._vllm_config():
            initialize_layerwise_reload(self.model)

    def _vllm_config(self):
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.worker.vllm_config)

    def load(self, weights: Weights) -> None:
        """Give checkpoint tensors (full shapes, any float dtype) to vLLM's loaders, which slice, fuse and quantize."""
        self.received += [[name, dtype_name(weight.dtype), list(weight.shape)] for name, weight in weights]
        with self._vllm_config():
            self.loaded |= self.model.load_weights(weights)

    def close(self, complete: bool = True) -> None:
        """End the session. With `complete`, raise ValueError unless every weight came once and reached a parameter."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # It warns of layers without weights in any checkpoint, such as tied heads; `stale` below finds real gaps.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        with self._vllm_config():
            finalize_layerwise_reload(self.model, self.worker.model_config)
        repack_heads(self.model)
        repair_zero_rows(self.model.parameters())
        if complete:
            check_manifest(self.received, self.worker.expected_weights)
            if stale := sorted(self.parameters - self.loaded):
                raise ValueError(f"{len(stale)} engine parameters got no weight and are stale: {', '.join(stale)}")


def repack_heads(model: torch.nn.Module) -> None:
    """On the CPU a tied head, which is no layer of its own to a session, would go on using a packed old copy."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module.weight, Float8Tensor):
            module.quant_method.process_weights_after_loading(module)


class Copy(NamedTuple):
    """A copy from a view of a received weight to rows of a parameter; (offset, shape, stride) in elements."""

    weight: str
    source: tuple[int, tuple[int, ...], tuple[int, ...]]
    parameter: str
    target: tuple[int, tuple[int, ...], tuple[int, ...]]


class CopyRecorder(TorchFunctionMode):
    """While active, every `copy_` from one of `weights` into one of `parameters` is written down instead of done."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]], parameters: Iterable[tuple[str, torch.Tensor]]):
        super().__init__()
        self.weights, self.parameters = (
            {tensor.untyped_storage()._cdata: name for name, tensor in named} for named in (weights, parameters)
        )
        self.copies: list[Copy] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            target, source = args[:2]
            weight = self.weights.get(source.untyped_storage()._cdata)
            parameter = self.parameters.get(target.untyped_storage()._cdata)
            if weight and parameter:
                views = [(view.storage_offset(), tuple(view.shape), view.stride()) for view in (source, target)]
                self.copies.append(Copy(weight, views[0], parameter, views[1]))
                return target
        return function(*args, **kwargs or {})


def record_copies(worker, manifest: Manifest) -> list[Copy]:
    """What a reload session would copy from the manifest's weights, learned from weights that have a shape and no memory.

    To vLLM it is a session in which no weight came: it puts the live tensors back as they were. Raises ValueError if the
    loaders want to see the weights themselves.
    """
    weights = [(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta")) for name, dtype, shape in manifest]
    session = ReloadSession(worker)  # the parameters are in full precision and on the meta device now, but for biases
    recorder = CopyRecorder(weights, session.model.named_parameters())
    try:
        with recorder:
            session.load(weights)
    except RuntimeError as error:
        raise ValueError(f"vLLM's loaders of this model do more than copy: {error}") from error
    finally:
        session.close(complete=False)
    return recorder.copies


class Replay:
    """A session's copies without vLLM's loaders: rows are quantized straight into the live tensors.

    Raises:
        ValueError: why this model or torchao config cannot be replayed exactly.
    """

    def __init__(self, model: torch.nn.Module, copies: list[Copy], buckets: Buckets):
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        parameters, covered = dict(model.named_parameters(remove_duplicate=False)), {}
        by_weight: dict[str, list[Copy]] = {}
        for copy in dict.fromkeys(copies):  # vLLM makes some copies twice
            covered[copy.parameter] = covered.get(copy.parameter, 0) + math.prod(copy.source[1])
            by_weight.setdefault(copy.weight, []).append(copy)
        for name, parameter in model.named_parameters():
            module, needed = model.get_submodule(name.rpartition(".")[0]), parameter.numel()
            if isinstance(module, VocabParallelEmbedding):  # the other rows are padding and stay zero
                needed = needed // parameter.shape[0] * module.shard_indices.num_org_elements
            if not parameter.numel():
                raise ValueError(f"vLLM's CPU backend has packed {name} out of sight")
            if covered.get(name, 0) != needed:
                raise ValueError(f"copies cover {covered.get(name, 0)} of {needed} elements of {name}")
        check_post_processing(model)
        check_quantizer(model)
        self.live, self.on_gpu, self.graphs = live_addresses(model), buckets.digests.is_cuda, {}
        self.capturing = buckets.streams.Stream()
        self.steps = []  # for each bucket: arguments of quantize_rows, and of _foreach_copy_
        for pieces in buckets.pieces:
            bound = [
                bind(copy, piece, view, parameters[copy.parameter])
                for piece, view in pieces
                for copy in by_weight.get(piece.name, [])
            ]
            plain = [pair for pair in bound if pair and len(pair) == 2]
            self.steps.append(([triple for triple in bound if triple and len(triple) == 3], tuple(zip(*plain))))

    def __call__(self, number: int) -> None:
        """Bucket `number` is in its memory. Done once as written, then as a CUDA graph: hundreds of small kernels."""
        if number in self.graphs:
            return self.graphs[number].replay()
        self._quantize_and_copy(number)
        if self.on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self.capturing):  # torch.cuda.graph() would wait for the device, without a limit
                graph.capture_begin(capture_error_mode="thread_local")
                self._quantize_and_copy(number)
                graph.capture_end()
            self.graphs[number] = graph

    def _quantize_and_copy(self, number: int) -> None:
        rows, plain = self.steps[number]
        for source, qdata, scale in rows:
            quantize_rows(source, qdata, scale)
        if plain:
            torch._foreach_copy_(*plain)


def bind(copy: Copy, piece: Piece, view: torch.Tensor, parameter: torch.Tensor) -> tuple | None:
    """The part of a recorded copy that lies in a piece, as views of bucket and live tensors; None if there is none.

    Returns (source, qdata, scale) for `quantize_rows` or (target, source) of a plain copy. Raises ValueError unless the
    copy is one of rectangles, and of whole rows for an FP8 parameter.
    """

    def rectangle(view: tuple, width: int) -> tuple[int, int, int, int]:
        """First row, rows, first column, columns."""
        offset, shape, stride = view
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        dense = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
        if list(stride[1:]) != dense or (rows > 1 and stride[0] != width):
            raise ValueError(f"{copy} is no copy of a rectangle")
        return offset // width, rows, offset % width, columns

    count = piece.shape[0] if piece.shape else 1
    source, width = view.view(count, -1), parameter.numel() // parameter.shape[0]
    row, rows, column, columns = rectangle(copy.source, source.shape[1])
    target_row, target_rows, target_column, target_columns = rectangle(copy.target, width)
    first, last = max(row, piece.row), min(row + rows, piece.row + count)
    if first >= last:
        return None
    source = source[first - piece.row : last - piece.row, column : column + columns]
    span = slice(target_row + first - row, target_row + last - row)
    if (rows, columns) != (target_rows, target_columns):
        raise ValueError(f"{copy} changes the shape")
    if not isinstance(parameter, Float8Tensor):
        return parameter.data.view(-1, width)[span, target_column : target_column + columns], source
    if parameter.scale.shape != (parameter.shape[0], 1) or columns != width or not parameter.qdata.is_contiguous():
        raise ValueError(f"{copy.parameter} is not quantized row by row")
    if source.dtype != parameter.dtype:
        raise ValueError(f"{copy.weight} is sent as {source.dtype}, vLLM quantizes {parameter.dtype}")
    return source, parameter.qdata[span], parameter.scale[span]


def quantize_rows(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor) -> None:
    """Write `source` (rows, columns; BF16) as FP8 e4m3 bytes and one FP32 scale per row, shape (rows, 1).

    Bit-identical to torchao 0.18's PerRow: amax / 448 is rounded to BF16 before it becomes FP32. Only all-zero rows
    differ: zero bytes and scale 1 (see `repair_zero_rows`).
    """
    if source.is_cuda:
        rows, columns = source.shape
        block = triton.next_power_of_2(columns)
        quantize_rows_kernel[(rows,)](
            source, source.stride(0), qdata, scale, columns, block, num_warps=min(16, max(1, block // 1024))
        )
        return
    limit = torch.finfo(qdata.dtype).max
    scale_R1 = (source.abs().amax(dim=1, keepdim=True) / limit).float()
    dead_R1 = scale_R1 == 0
    quotient_RC = (source.float() / scale_R1).clamp(-limit, limit)
    qdata.copy_(quotient_RC.masked_fill(dead_R1, 0).to(qdata.dtype))
    scale.copy_(scale_R1.masked_fill(dead_R1, 1))


@triton.jit(do_not_specialize_on_alignment=["scale"])
def quantize_rows_kernel(source, source_stride, qdata, scale, columns, BLOCK: tl.constexpr):
    """One program a row, which stays in registers: it is read once and written once."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(source + row * source_stride + column, mask=inside, other=0.0).to(tl.float32)
    row_scale = tl.div_rn(tl.max(tl.abs(x)), 448.0).to(tl.bfloat16).to(tl.float32)
    if tl.max((x != x).to(tl.int32)) > 0:
        row_scale = float("nan")  # tl.max ignores NaN, torch's amax does not
    dead = row_scale == 0.0
    quotient = tl.div_rn(x, tl.where(dead, 1.0, row_scale))
    quotient = tl.where(dead, 0.0, tl.clamp(quotient, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(qdata + row * columns + column, quotient.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, tl.where(dead, 1.0, row_scale))


def check_post_processing(model: torch.nn.Module) -> None:
    """Raise ValueError if vLLM derives more from loaded weights than FP8 rows: a replay would leave that as it was.

    Examples are MLA's split projections, and the attention sinks of which some backends (FlashInfer) keep an FP32 copy.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.torchao import TorchAOLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.attention.backend import AttentionImplBase

    nothing_else = (NoneType, TorchAOLinearMethod, UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for name, module in model.named_modules():
        doer = module.impl if type(module) is Attention else module
        hook = getattr(type(doer), "process_weights_after_loading", None)
        idle = hook in (None, AttentionImplBase.process_weights_after_loading) or getattr(doer, "_sinks_source", 0) is None
        if not idle or type(getattr(module, "quant_method", None)) not in nothing_else:
            raise ValueError(f"vLLM derives more than FP8 rows from the weights of {name} ({type(doer).__name__})")


def check_quantizer(model: torch.nn.Module) -> None:
    """Raise ValueError unless `quantize_rows` gives torchao's bytes for every FP8 width and torchao config of the model."""
    from vllm.model_executor.layers.quantization.torchao import torchao_quantize_param_data

    cases = {}
    for name, weight in model.named_parameters():
        if isinstance(weight, Float8Tensor):
            config = model.get_submodule(name.rpartition(".")[0]).quant_method.quant_config.torchao_config
            cases[weight.shape[1], id(config)] = config, weight.device
    for (columns, _), (config, device) in cases.items():
        probe = torch.randn(16, columns, device=device) * torch.logspace(-3, 3, 16, device=device).view(-1, 1)
        probe = torch.nn.Parameter(probe.bfloat16(), requires_grad=False)
        expected = torchao_quantize_param_data(probe, config)
        if not isinstance(expected, Float8Tensor) or expected.scale.shape != (16, 1):
            raise ValueError("the torchao config does not quantize to FP8 row by row")
        qdata, scale = torch.empty_like(expected.qdata), torch.empty_like(expected.scale)
        quantize_rows(probe, qdata, scale)
        if not (torch.equal(as_bytes(qdata), as_bytes(expected.qdata)) and torch.equal(scale, expected.scale)):
            raise ValueError("torchao's quantization with this config differs from quantize_rows")


def repair_zero_rows(parameters: Iterable[torch.Tensor]) -> int:
    """Give FP8 rows whose scale is 0 zero bytes and scale 1, in place; returns how many.

    torchao 0.18 divides an all-zero row (or one so small that amax / 448 underflows) by its scale of 0: NaN.
    """
    repaired = 0
    for weight in (p for p in parameters if isinstance(p, Float8Tensor)):
        dead = weight.scale == 0  # (rows, groups): one group for PerRow, (1, 1) for PerTensor
        groups = weight.qdata.view(torch.uint8).view(weight.shape[0], dead.shape[-1], -1)
        groups.masked_fill_(dead.unsqueeze(-1), 0)
        weight.scale.masked_fill_(dead, 1.0)
        repaired += dead.sum()
    return int(repaired)


def inspect_linear_layers(model: torch.nn.Module) -> dict:
    """Count what is really FP8. Sizes in GiB of this rank's shard; `unquantized` maps a reason to layer names."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    fp8, unquantized, linear, hidden = 0, {}, [], 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (LinearBase, ParallelLMHead)) or weight is None:
            continue
        if isinstance(module, LinearBase):
            linear.append(weight)
            if not weight.numel():  # vLLM's CPU backend has packed it out of sight
                hidden += module.input_size_per_partition * module.output_size_per_partition
        if isinstance(weight, Float8Tensor):
            fp8 += 1
        elif isinstance(module, ParallelLMHead):
            unquantized.setdefault("it is an output head, tied or without --quantize-head", []).append(name)
        elif any(size % 16 for size in weight.shape):
            unquantized.setdefault("a shard dimension is no multiple of 16", []).append(f"{name} {tuple(weight.shape)}")
        else:
            unquantized.setdefault("quantization is off for it", []).append(name)

    def gib(weights: Iterable[torch.Tensor]) -> float:
        """As stored; what is hidden counts as BF16."""
        return (sum(t.nbytes for w in weights for t in plain_tensors(w).values()) + 2 * hidden) / 2**30

    return {
        "fp8_linear_layers": fp8,
        "unquantized_linear_layers": sum(map(len, unquantized.values())),
        "unquantized": unquantized,
        "weights_gib": gib(model.parameters()),
        "bf16_weights_gib": 2 * (sum(p.numel() for p in model.parameters()) + hidden) / 2**30,
        "linear_gib": gib(linear),
    }


class ShardVerifier:
    """Compares an engine's shard, bit for bit, with full-precision weights, without using vLLM's loaders.

    `check` takes checkpoint tensors in any order and cuts out this rank's part by the rules of tensor parallelism
    (Megatron-LM, arXiv:1909.08053): column-parallel layers are cut along the outputs, q, k, v and gate, up one by one;
    row-parallel layers along the inputs, their bias not at all; embeddings along the vocabulary, padded with zeros.
    torchao then quantizes the part afresh. Read `compared` (a count), `different`, `hidden` (packed away by vLLM's CPU
    backend, so that only outputs can tell) and `unseen` (never sent).
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.compared, self.different, self.hidden = model, 0, [], []
        self.unseen = dict(model.named_parameters())
        fused = getattr(model, "packed_modules_mapping", {})
        self.place = {part: (whole, i, len(parts)) for whole, parts in fused.items() for i, part in enumerate(parts)}
        self.parts: dict[str, dict[int, torch.Tensor]] = {}

    def check(self, weights: Weights) -> None:
        """Compare each weight, or keep its part until the layer that it is fused into is complete."""
        for name, full in weights:
            *parent, leaf, kind = name.split(".")
            whole, index, count = self.place.get(leaf, (leaf, 0, 1))
            path = ".".join([*parent, whole])
            module, parts = self.model.get_submodule(path), self.parts.setdefault(f"{path}.{kind}", {})
            parts[index] = self._cut(module, index, kind, full).clone()  # the bucket under `full` is short-lived
            if len(parts) == count:
                self._compare(f"{path}.{kind}", module, torch.cat([parts.pop(i) for i in range(count)]))

    @staticmethod
    def _cut(module: torch.nn.Module, index: int, kind: str, full: torch.Tensor) -> torch.Tensor:
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        if isinstance(module, VocabParallelEmbedding):
            rows = full[module.shard_indices.org_vocab_start_index : module.shard_indices.org_vocab_end_index]
            return torch.nn.functional.pad(rows, (0, 0, 0, module.weight.shape[0] - rows.shape[0]))
        if isinstance(module, ColumnParallelLinear):
            shared = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) and index else 1
            return full.chunk(module.tp_size // shared)[module.tp_rank // shared]
        if isinstance(module, RowParallelLinear) and kind == "weight":
            return full.chunk(module.tp_size, dim=1)[module.tp_rank]
        return full

    def _compare(self, name: str, module: torch.nn.Module, shard: torch.Tensor) -> None:
        from vllm.model_executor.layers.quantization.torchao import torchao_quantize_param_data

        actual = self.unseen.pop(name)
        if not actual.numel():
            self.hidden.append(name)
            return
        expected = torch.nn.Parameter(shard.to(actual.dtype), requires_grad=False)
        if isinstance(actual, Float8Tensor):
            expected = torchao_quantize_param_data(expected, module.quant_method.quant_config.torchao_config)
            repair_zero_rows([expected])
        for part, tensor in plain_tensors(actual).items():
            self.compared += 1
            if not torch.equal(as_bytes(tensor), as_bytes(plain_tensors(expected)[part])):
                self.different.append(f"{name} {part}".strip())


def agreed(method):
    """Decorator for worker methods: all ranks run it, then all learn of any error, and the last rank alone raises it.

    vLLM's executor reads replies in rank order and stops at the first error; a reply behind it would stay in the queue
    and answer the next call. The last rank has none behind it.
    """

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        from vllm.distributed import get_world_group

        error = result = None
        try:
            result = method(self, *args, **kwargs)
        except Exception as caught:  # raised below, for all ranks at once
            logger.exception("%s failed", method.__name__)
            error = f"{type(caught).__name__}: {caught}"
        group = get_world_group()
        errors = [error] * group.world_size
        if group.world_size > 1:  # a rank that does not come is named; after an error the others are not far behind
            limit = timedelta(seconds=2 if error else getattr(self.weight_group, "timeout_s", 600))
            try:
                dist.monitored_barrier(group.cpu_group, limit, wait_all_ranks=True)
            except RuntimeError as missing:
                found = f"engine rank {group.rank_in_group}: {error or 'done'}; {missing}"
                raise RuntimeError(f"{method.__name__} failed. {found}") from missing
            dist.all_gather_object(errors, error, group=group.cpu_group)
        if any(errors) and group.rank_in_group == group.world_size - 1:
            failed = "; ".join(f"engine rank {rank}: {e}" for rank, e in enumerate(errors) if e)
            raise RuntimeError(f"{method.__name__} failed. {failed}")
        return result

    return call


class WorkerExtension:
    """What a vLLM worker can do besides generating. Call by name: `llm.collective_rpc("method", args=(...))`.

    Two ways to bring new weights, both quantized on arrival:
      - `agree_on_weights(manifest)` once, then `receive_weights()`: everything in one call, against a `WeightSender`;
      - `update_weight(name, dtype_name, shape)` for each weight beside its broadcast, then `check_weights_changed()`.
    """

    weight_group = None
    reload_session: ReloadSession | None = None
    stored_digests: torch.Tensor | None = None  # of the tensors in use; None if not known
    buckets: Buckets | None = None
    wire_digests: torch.Tensor | None = None  # of the buckets that are in use; None if not known
    replay: Replay | None = None
    weights_changed = False

    @functools.cached_property
    def expected_weights(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by name, of a Hugging Face model of the engine's own config; built once."""
        from transformers import AutoModelForCausalLM

        config, trust = self.model_config.hf_config, self.model_config.trust_remote_code
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        return {name: tuple(weight.shape) for name, weight in named_weights(model).items()}

    @agreed
    def init_weight_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, backend=None, timeout_s=60.0
    ) -> None:
        """Join the trainer's group as rank `rank_offset` + this worker's rank; see `stateless_init_process_group`."""
        rank, self.buckets, self.replay = rank_offset + self.rank, None, None
        self.weight_group = stateless_init_process_group(
            master_address, master_port, rank, world_size, self.device, backend, timeout_s
        )

    @agreed
    def inspect_quantization(self) -> dict:
        """Prove at start-up what is FP8 (see `inspect_linear_layers`); repairs zero rows of the first load."""
        repaired = repair_zero_rows(self.get_model().parameters())
        self.stored_digests = self._digests()
        cache = self.vllm_config.cache_config
        return inspect_linear_layers(self.get_model()) | {
            "rank": self.rank,
            "zero_rows_repaired": repaired,
            "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
            "imported_at": imported_at(),
            "compilation_s": self.vllm_config.compilation_config.compilation_time,
        }

    def peak_memory_gib(self) -> float:
        """Most GPU memory that torch has allocated since the last call or vLLM's own reset; on the CPU resident now."""
        if self.device.type == "cpu":
            return psutil.Process().memory_info().rss / 2**30
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    @agreed
    def agree_on_weights(self, manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> str | None:
        """Raise one ValueError with all that is wrong, before a byte moves; otherwise prepare for these weights.

        Returns why updates have to be reload sessions, or None if they can be replays.
        """
        check_manifest(manifest, self.expected_weights)
        self.buckets = self.replay = None  # their memory is free before new buckets take theirs
        self.buckets = Buckets(manifest, bucket_bytes, self.weight_group, self.device)
        self._know_what_is_stored()
        return self._prepare_replay()

    def _prepare_replay(self) -> str | None:
        self.replay = None
        self._abandon_update()
        try:
            self.replay = Replay(self.get_model(), record_copies(self, self.buckets.manifest), self.buckets)
        except ValueError as error:
            return str(error)

    @agreed
    def receive_weights(self) -> dict | None:
        """Receive a complete set of weights, as agreed on; None if rank 0 has none to send. Blocks until it has sent."""
        if self.replay and self.replay.live != live_addresses(self.get_model()):
            reason = self._prepare_replay()
            now = f"updates are reload sessions, because {reason}" if reason else "what vLLM copies has been recorded anew"
            logger.warning("the engine's tensors have moved: %s", now)
        if not announce(self.weight_group, self.device):
            return None
        self._abandon_update()
        if self.replay:
            wire, stored = self.wire_digests, self.stored_digests
            self.wire_digests = self.stored_digests = None
            matched = use_all(self.buckets.receive(), self.replay)
            if self.device.type == "cpu":
                repack_heads(self.get_model())
            self.wire_digests = self.buckets.digests.clone()
            if wire is not None:
                self.weights_changed = not torch.equal(wire, self.wire_digests)
            else:
                self.stored_digests = self._digests()
                self.weights_changed = stored is None or not torch.equal(stored, self.stored_digests)
        else:
            self._begin_update()
            try:
                matched = use_all(self.buckets.receive(), WholeWeights(self.buckets, self.reload_session.load))
            except Exception:
                self._abandon_update()
                raise
            self._end_update()
        path = "replay" if self.replay else "session"
        return {"buckets_matched": matched, "changed": self.weights_changed, "path": path}

    @agreed
    def verify_weights(self) -> dict | None:
        """Receive the weights once more, only to compare; see `ShardVerifier`. None if rank 0 has none to send."""
        if not announce(self.weight_group, self.device):
            return None
        verifier = ShardVerifier(self.get_model())
        use_all(self.buckets.receive(), WholeWeights(self.buckets, verifier.check))
        different = verifier.different + [f"{name} (never sent)" for name in verifier.unseen]
        return {"compared": verifier.compared, "different": different, "hidden": verifier.hidden}

    @agreed
    def update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Receive one weight that rank 0 broadcasts now. The first call opens the update."""
        weight = torch.empty(tuple(shape), dtype=getattr(torch, dtype_name), device=self.device)
        broadcast(self.weight_group, weight, name)  # before any check: rank 0 is already sending
        if self.reload_session is None:
            self._begin_update()
        try:
            self.reload_session.load([(name, weight)])
        except Exception:
            self._abandon_update()
            raise

    @agreed
    def check_weights_changed(self) -> bool:
        """End an update that `update_weight` began, and tell whether the last update changed any stored byte.

        Compares digests of this rank's FP8 bytes, scales and plain parameters before and after.
        """
        if self.reload_session is not None:
            self._end_update()
        return self.weights_changed

    def _begin_update(self) -> None:
        self._know_what_is_stored()
        self.reload_session = ReloadSession(self)

    def _abandon_update(self) -> None:
        if self.reload_session is not None:
            self._end_update(complete=False)

    def _know_what_is_stored(self) -> None:
        self.wire_digests = None
        if self.stored_digests is None:
            self.stored_digests = self._digests()

    def _end_update(self, complete: bool = True) -> None:
        session, self.reload_session = self.reload_session, None
        session.close(complete)
        digests = self._digests()
        self.weights_changed = not torch.equal(digests, self.stored_digests)
        self.stored_digests = digests

    def _digests(self) -> torch.Tensor:
        tensors = [t for parameter in self.get_model().parameters() for t in plain_tensors(parameter).values()]
        return torch.stack([digest(tensor) for tensor in tensors])


# ----- Small things ---------------------------------------------------------------------------------------------------


def plain_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that hold the bytes: torchao's FP8 bytes and one scale per row, or {"": tensor} of any other tensor."""
    return {"qdata": tensor.qdata, "scale": tensor.scale} if isinstance(tensor, Float8Tensor) else {"": tensor}


@Float8Tensor.implements(torch.ops.aten.empty_like.default)
def empty_like(function, types, args, kwargs):
    """torchao 0.18 lacks it; vLLM then cannot store what it has compiled, and every start of an engine compiles anew."""
    return args[0]._apply_fn_to_data(lambda tensor: function(tensor, **kwargs))


def allow_fp8_heads() -> None:
    """Let vLLM's torchao quantize an untied output head as well, if `hf_overrides` has `quantize_lm_head`."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.quantization.torchao import TorchAOConfig, TorchAOLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    plain = TorchAOConfig.get_quant_method

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """vLLM's own, which knows linear layers only; and heads."""
        if isinstance(layer, ParallelLMHead):
            config = get_current_vllm_config().model_config.hf_config
            if getattr(config, "quantize_lm_head", False) and not config.tie_word_embeddings:
                return TorchAOLinearMethod(self)
        return plain(self, layer, prefix)

    TorchAOConfig.get_quant_method = get_quant_method


if "vllm" in sys.modules:  # an engine's worker imports this module before it builds the model
    allow_fp8_heads()


def scaled_mm(a_data, a_scale, b_data, b_scale, output_dtype, output_scale=None, bias=None, use_fast_accum=False):
    """In place of torchao's own FP8 product: activations (M, K) by weights (K, N), scales (M, 1) and (1, N); BF16 (M, N).

    For a scale per row, cuBLAS took one tile of 128 x 128 throughout, which leaves most of a GPU idle in a decoding step.
    vLLM's CUTLASS kernels have smaller ones; on an H200, with the layers of Qwen3-8B, they were faster at up to 128 rows and
    slower from 256 on. `tests/bench_rollout.py` compares whole engines.
    """
    output = a_data.new_empty(a_data.shape[0], b_data.shape[1], dtype=output_dtype)
    fastest_scaled_mm(output, a_data, b_data, a_scale, b_scale, bias, use_fast_accum)
    return output


@torch.library.custom_op("rlhf_online_quant::fastest_scaled_mm", mutates_args=("output",))
def fastest_scaled_mm(
    output: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    use_fast_accum: bool,
) -> None:
    """An operator of its own, because a compiled model does not know the number of rows until it runs."""
    if a.is_cuda and a.shape[0] <= 128:
        torch.ops._C.cutlass_scaled_mm(output, a, b, a_scale, b_scale, bias)  # vLLM's
    else:
        options = dict(bias=bias, out_dtype=output.dtype, use_fast_accum=use_fast_accum, out=output)
        torch._scaled_mm(a, b, a_scale, b_scale, **options)


float8_tensor.addmm_float8_unwrapped_inference = scaled_mm  # in every process that imports this module


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def imported_at() -> float:
    """When this process had done its imports, in seconds since the epoch: this module is the last of them.

    A function, because Ray sends the constants of a program's main file along: they would be the driver's.
    """
    return IMPORTED_AT


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
