"""Full-precision weights go over the wire; an FP8 vLLM engine quantizes them on arrival.

    trainer   rank 0       WeightSender      prepare_weights, agree_on_weights, send_weights
    workers   ranks 1..TP  WorkerExtension                    agree_on_weights, receive_weights

A sync, as the driver asks for it (`sync_weights_to_quantized_engine` in rlhf_online_quant.py), when both ends
have joined a group (`init_weight_update_group`):

    manifest = trainer.prepare_weights()                  # raises if there is NaN; None if agreed on already
    if manifest:                                          # the first time, and after a change
        manifest = workers.agree_on_weights(manifest)     # what would vLLM's loaders do with these weights?
        trainer.agree_on_weights(manifest)
    trainer.send_weights()  |  workers.receive_weights()  # at the same time

Reading order, with the number of lines of each part. What parts 1 to 4 do, with the digests of part 6, is a
complete, right sync, by sessions; part 5 makes it fast.

    1. the group     117  who sends to whom
    2. the session    80  how vLLM takes a whole new set of weights, and quantizes it
    3. the two ends  467  WeightSender, WorkerExtension
    4. the buckets   151  fixed memory for weights on their way, and digests of what came in
    5. the replay    248  what a session would copy, learned once, done again without vLLM's loaders
    6. bytes         161  digests, and rows quantized as torchao and vLLM do it; on GPUs by Triton kernels
    7. the patches    43  what the workers change in torchao and vLLM, and until when

Four rules decide the code:

1. One reload session for a whole update, or a replay of the copies that it would make. Outside of a session,
   `model.load_weights` rebuilds every layer that it touches from uninitialized memory.
2. A worker never leaves a broadcast early (`to_the_end`). What fails while loading is raised after the last
   bucket is in.
3. All workers agree on errors (`agreed`). One reply too many in vLLM's executor answers the next call.
4. Nobody waits for a broadcast without a limit (`wait_on_host`); whoever gives up says what it waited for.

Whether all this is right for a model is not argued here but measured, at every start: `prove_sync` in
rlhf_online_quant.py. vLLM is imported where it is used: the trainer's process starts without it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Float8Tensor
from transformers.core_model_loading import revert_weight_conversion

logger = logging.getLogger(__name__)
BUCKET_BYTES = 256 * 2**20
Manifest = list[list]  # [[name, dtype name such as "bfloat16", shape], ...] in the order of sending
NamedTensors = Iterator[tuple[str, Tensor]]


# ----- 1. The group: rank 0 is the trainer, ranks 1..TP are the engine's workers --------------------------


class GlooGroup:
    """Broadcasts over TCP, for CPU tensors and, through host memory, for CUDA tensors."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, address: str, timeout_s: float):
        self.rank, self.timeout_s = rank, timeout_s
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        """Send `tensor` (contiguous, any dtype) from rank `src` to that of every other rank; blocks."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        data = as_bytes(tensor)
        host = data.cpu()  # `data` itself if that is on the CPU
        self.gloo.broadcast([host], options).wait()
        data.copy_(host)

    def destroy(self) -> None:
        """As NCCL's: end what has been begun. Here nothing outlives its call."""


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening socket on an IPv4 or IPv6 address or host name; port 0 takes a free one."""
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address, port), family=family)


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

    It leaves torch.distributed's default group alone, so it works inside a vLLM worker. Every rank must call
    it; rank 0 serves the rendezvous, on `master_address` (IPv4, IPv6, name) only. Nothing is unpickled.

    Args:
        device: where this rank's tensors live; without `backend`, CUDA means NCCL and CPU means gloo.
        backend: "nccl" or "gloo"; give it when the two ends differ (gloo is for a group with any CPU rank).
        timeout_s: seconds to wait for the other ranks, and (in `Buckets`) for each broadcast.
        listen_socket: rank 0 may bring a socket that listens already, so that nobody else can take the port.

    Raises:
        TimeoutError: which ranks did not arrive in time.
        OSError: rank 0 cannot listen there (is the port taken?).
        RuntimeError: NCCL is off or cannot be loaded (vLLM's communicator would then do nothing, silently).
    """
    device, timeout = torch.device(device), timedelta(seconds=timeout_s)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # NCCL wants to know which
    where = f"{master_address}:{master_port}"
    options = {"wait_for_workers": False, "use_libuv": False}
    if rank == 0:
        options["master_listen_fd"] = (listen_socket or listen(master_address, master_port)).detach()
    try:
        store = dist.TCPStore(master_address, master_port, None, rank == 0, timeout, **options)
    except dist.DistNetworkError as error:
        raise TimeoutError(f"rank {rank} found no rank 0 at {where} in {timeout_s:g} s") from error
    store.set(f"joined/{rank}", "")
    try:
        store.wait([f"joined/{other}" for other in range(world_size)], timeout)
    except dist.DistStoreError as error:
        missing = [other for other in range(world_size) if not store.check([f"joined/{other}"])]
        waited = f"rank {rank} waited {timeout_s:g} s at {where} in vain for ranks {missing}"
        raise TimeoutError(waited) from error
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
        why = "NCCL is disabled in vLLM (is VLLM_DISABLE_PYNCCL set?), weights cannot flow"
        raise RuntimeError(f"rank {rank}: {why}")
    group.store, group.timeout_s = store, timeout_s  # the other ranks may still be reading the store
    return group


def broadcast(group, tensor: Tensor, what: str, stream=None) -> None:
    """Broadcast from rank 0; an error of gloo's, which waits here, says where it happened."""
    at = f"rank {group.rank}, {what}"
    if getattr(group, "disabled", False):  # vLLM's communicator would do nothing, silently
        raise ConnectionError(f"{at}: this group was given up after an error; join a new one")
    try:
        group.broadcast(tensor, src=0, stream=stream)
    except RuntimeError as error:
        raise ConnectionError(f"{at}: {error}") from error


def wait_on_host(event, group, what: str) -> None:
    """Until a broadcast has ended; aborts and raises TimeoutError, where NCCL would wait for ever."""
    deadline = time.monotonic() + group.timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            group.destroy()  # NCCL's kernels would keep the GPU busy for ever
            raise TimeoutError(f"rank {group.rank}, {what}: no progress for {group.timeout_s:g} s")
        time.sleep(1e-4)


# ----- 2. The session: vLLM's own way to load a whole new set of weights into a running model -------------


class ReloadSession:
    """One update of a whole vLLM model in place: open, `load` every weight once (in any calls), close.

    vLLM's loaders slice, fuse and quantize. The tensors keep their addresses, as captured CUDA graphs need.
    Close one that failed, too: the model holds no valid weights then, but can be reloaded.
    """

    def __init__(self, model: torch.nn.Module, model_config):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.model, self.model_config = model, model_config
        self.loaded, self.is_open = set(), True
        for module in model.modules():  # on the CPU a session would meet what the first load has left behind
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and module.w13_weight.is_cpu:
                module.quant_method.moe_kernel = None  # vLLM packs experts only where there is no kernel yet
        initialize_layerwise_reload(model)

    def load(self, weights: NamedTensors) -> None:
        """Give checkpoint tensors (full shapes, any dtype) to vLLM's loaders; an error names the weight."""
        at = "the first weight"

        def watched() -> NamedTensors:
            """The weights, noting which one the loader has asked for."""
            nonlocal at
            for name, weight in weights:
                at = f"{name} {list(weight.shape)}"
                yield name, weight

        try:
            self.loaded |= self.model.load_weights(watched()) or set()
        except (ConnectionError, TimeoutError):  # the wire, not the loader
            raise
        except Exception as error:
            raise RuntimeError(f"vLLM's loader failed at {at}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Let vLLM finish what it has, and mend what it leaves."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self.is_open = False
        # It warns of layers without weights in any checkpoint, such as tied heads.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        finalize_layerwise_reload(self.model, self.model_config)
        repair_zero_rows(self.model.parameters())

    def stale(self) -> list[str]:
        """Names of the parameters that got no weight, by vLLM's own account."""
        return sorted({name for name, _ in self.model.named_parameters()} - self.loaded)


def repair_zero_rows(parameters: Iterable[Tensor]) -> None:
    """Give FP8 blocks (PerRow: rows) whose scale is 0 zero bytes and scale 1, in place.

    torchao 0.18 divides an all-zero row (or one so small that amax / 448 underflows) by its scale of 0: NaN.
    """
    for weight in parameters:
        if isinstance(weight, Float8Tensor) and (dead := weight.scale == 0).any():  # one for each block
            mask = dead
            for dimension, size in enumerate(weight.block_size):
                mask = mask.repeat_interleave(size, dimension).narrow(dimension, 0, weight.shape[dimension])
            weight.qdata.view(torch.uint8).masked_fill_(mask, 0)
            weight.scale.masked_fill_(dead, 1.0)


# ----- 3. The two ends ------------------------------------------------------------------------------------


def checkpoint_weights(model: torch.nn.Module, known: dict | None = None) -> NamedTensors:
    """Names and tensors of what `save_pretrained` would write, layer by layer; a tied weight once.

    vLLM's loaders are made for the file. Inside a Hugging Face model experts may be fused, and names differ.
    Most are views of the model's tensors; a dictionary, `known`, remembers which for the next time.
    """
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    seen, weights = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name not in ignored:
            seen.add(id(tensor))
            weights[name] = tensor
    if getattr(model, "_weight_conversions", None) == []:  # `from_pretrained` had nothing to convert
        yield from weights.items()
        return
    layers, known = {}, {} if known is None else known
    for name, tensor in weights.items():
        layer = re.match(r".*?\.\d+\.", name)
        layers.setdefault(layer and layer[0], {})[name] = tensor.detach()
    for layer in layers.values():  # one after another, because some conversions copy
        shapes = tuple((name, tensor.shape, tensor.stride()) for name, tensor in layer.items())
        if shapes not in known:
            known[shapes] = saved_views(model, layer)
        if known[shapes] is None:
            yield from revert_weight_conversion(model, layer).items()
        else:
            for name, (source, size, stride, offset) in known[shapes].items():
                yield name, layer[source].as_strided(size, stride, layer[source].storage_offset() + offset)


def saved_views(model: torch.nn.Module, layer: dict[str, Tensor]) -> dict[str, tuple] | None:
    """Where in a layer's tensors lies what `save_pretrained` makes of them.

    Returns name -> (name of the layer's tensor, size, stride, offset to it); None if something is computed.
    """
    if any(map(is_traceable_wrapper_subclass, layer.values())):  # DTensors have no strides of their own
        return None
    with NoCopies():
        saved = revert_weight_conversion(model, layer)
    sources, views = {storage(tensor): name for name, tensor in layer.items()}, {}
    for name, tensor in saved.items():
        source = sources.get(storage(tensor))
        if source is None or tensor.dtype != layer[source].dtype:
            return None
        offset = tensor.storage_offset() - layer[source].storage_offset()
        views[name] = (source, tensor.shape, tensor.stride(), offset)
    return views


class NoCopies(TorchFunctionMode):
    """While active, `contiguous` returns what it is given: parts of a tensor stay parts of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is Tensor.contiguous else function(*args, **kwargs or {})


def storage(tensor: Tensor) -> int:
    """What views of one tensor have in common."""
    return tensor.untyped_storage()._cdata


class WeightSender:
    """The trainer's end, to inherit from or to hold: rank 0 of the group, and the twin of `WorkerExtension`.

    Weights may change, move and be replaced between syncs. A sharded trainer has an actor for each rank, and
    overrides `weights` to gather them; with FSDP2 (parameters; a buffer is no `DTensor`) by

        return ((name, weight.full_tensor()) for name, weight in super().weights())

    All ranks call `prepare_weights` and `send_weights`; the one that has joined the group sends. Weights are
    gathered twice a sync: to be checked for NaN, and to be sent.

    Args:
        model: any module; of a Hugging Face model the weights travel as `save_pretrained` would write them.
        device: where the buckets are to be.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device | str):
        self.model, self.device = model, torch.device(device)
        self.group: object | None = None
        self.scanned: tuple[Manifest, list[str]] | None = None  # what there is, and which of it is not finite
        self.prepared: tuple[Manifest, int] | None = None  # ... and the bucket size
        self.buckets: Buckets | None = None  # for what is prepared; None until both ends have agreed
        self.views = {}  # of the model's tensors: see `checkpoint_weights`

    def weights(self) -> NamedTensors:
        """Yield (name, full tensor) of every weight, always in the same order. To be overridden."""
        return checkpoint_weights(self.model, self.views)

    def _not_empty(self) -> NamedTensors:
        return ((name, weight) for name, weight in self.weights() if weight.numel())

    def open_rendezvous(self, address: str | None) -> tuple[str, int]:
        """Hold a listening socket on `address` (None: this node's own) and a free port; returns both."""
        if address is None:
            import ray

            address = ray.util.get_node_ip_address()
        self.listen_socket = listen(address)
        return address, self.listen_socket.getsockname()[1]

    def init_weight_update_group(
        self, master_address: str, master_port: int, world_size: int, backend=None, timeout_s=60.0
    ) -> None:
        """Join as rank 0, after `open_rendezvous` and beside the workers' method of the same name."""
        self.buckets = None
        self.group = stateless_init_process_group(
            master_address, master_port, 0, world_size, self.device, backend, timeout_s, self.listen_socket
        )

    @torch.no_grad()
    def scan_weights(self) -> None:
        """Look at every weight. After `optimizer.step()`, which has to wait anyway, it delays no sync."""
        manifest, names, peaks, batch, size = [], [], [], [], 0
        for name, weight in self._not_empty():
            manifest.append([name, dtype_name(weight.dtype), list(weight.shape)])
            if weight.is_floating_point():
                names.append(name)
                batch.append(weight)
                size += weight.nbytes
            if size >= BUCKET_BYTES:  # gathered weights are not to pile up
                peaks, batch, size = [*peaks, *torch._foreach_norm(batch, ord=math.inf)], [], 0
        if batch:
            peaks += torch._foreach_norm(batch, ord=math.inf)
        largest = torch.empty(len(peaks), dtype=torch.bfloat16, device=self.device)
        torch._foreach_copy_(list(largest.unbind()), peaks)
        wrong = [name for name, finite in zip(names, largest.isfinite().tolist(), strict=True) if not finite]
        self.scanned = manifest, wrong

    def check_finite(self) -> Manifest:
        """The manifest of all weights. Raises ValueError, with names, if one is NaN, or infinite in BF16."""
        if self.scanned is None:
            self.scan_weights()
        (manifest, wrong), self.scanned = self.scanned, None
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights hold NaN or infinity and were not sent: {', '.join(wrong[:8])}. Go on "
                "from an earlier checkpoint with a lower learning rate"
            )
        return manifest

    def prepare_weights(self, bucket_bytes: int = BUCKET_BYTES) -> Manifest | None:
        """Check all weights, before a byte moves. Returns their manifest; None if it is the one agreed on."""
        manifest = self.check_finite()
        if self.buckets is not None and self.prepared == (manifest, bucket_bytes):
            return None
        self.prepared, self.buckets = (manifest, bucket_bytes), None
        return manifest

    def agree_on_weights(self, manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Get ready to send what `prepare_weights` has listed, in the dtypes of `manifest`."""
        self.buckets = None  # its memory is free before new buckets take theirs
        self.buckets = Buckets(manifest, bucket_bytes, self.group, self.device)

    @torch.no_grad()
    def send_weights(self) -> dict | None:
        """Broadcast every bucket, then the digests of what was sent, beside the workers' `receive_weights`.

        Returns `bytes`, `buckets` and `seconds`; None on a rank that is not in the group.
        """
        start = time.perf_counter()
        with to_the_end(self._not_empty()) as weights:  # all ranks of a sharded trainer gather all weights
            if self.group is None:
                return None
            self.buckets.send(weights)
        buckets = self.buckets.buckets
        sent = sum(piece.nbytes for _, pieces in buckets for piece, _ in pieces)
        return {"bytes": sent, "buckets": len(buckets), "seconds": time.perf_counter() - start}


@contextlib.contextmanager
def to_the_end(items: Iterator) -> Iterator[Iterator]:
    """Take what the block leaves of `items`, whatever happens in it: other ranks count on this one."""
    try:
        yield items
    finally:
        for _ in items:
            pass


def agreed(method):
    """Decorator for worker methods: all workers run it, all learn of any error, and the last one raises it.

    vLLM's executor reads replies in rank order and stops at the first error; a reply behind it would stay in
    the queue and answer the next call. The last worker has none behind it.
    """

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        """The method, under the worker's config; then every worker says whether it has failed."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import get_world_group
        from vllm.utils.torch_utils import set_default_torch_dtype

        group, error, result = get_world_group(), None, None
        try:  # as it is while vLLM loads a model: some loaders make tensors, some models build others
            with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(self.model_config.dtype):
                result = method(self, *args, **kwargs)
        except Exception as caught:  # raised below, for all workers at once
            logger.exception("%s failed", method.__name__)
            error = f"{type(caught).__name__}: {caught}"
        errors = [error] * group.world_size
        if group.world_size > 1:  # names who does not come; after an error the others are not far behind
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
    """The engine's end: `worker_extension_cls="rlhf_utils.WorkerExtension"` adds it to vLLM's workers.

    Called by name, `llm.collective_rpc("method", args=(...))`. Two ways to bring new weights:
      - `agree_on_weights` once, then `receive_weights`: everything in one call, against a `WeightSender`;
      - `update_weight(name, dtype_name, shape)` beside the broadcast of each, then `check_weights_changed()`.

    An update that fails leaves weights that are no version of anything, and **a plain `vllm.LLM` would go on
    generating with them**. `MyLLM` in rlhf_online_quant.py refuses to until an update was complete.
    """

    weight_group = None
    manifest: Manifest | None = None  # of the last complete set of weights: names and shapes stay
    buckets: Buckets | None = None  # None until both ends have agreed
    replay: Replay | None = None  # None: updates are reload sessions
    never_replay: str | None = None  # why there will be none, whatever both ends agree on
    unproven: dict[str, int] | None = None  # what was stored before the first replay, until one was compared
    session: ReloadSession | None = None  # that `update_weight` has opened, until an update was complete
    last_seen: dict[str, int] | None = None  # what was stored when `check_weights_changed` was last asked

    def __new__(cls, *args, **kwargs):
        """The first thing that happens in a worker, before there is a model."""
        patch_libraries()
        return super().__new__(cls)

    @agreed
    def init_weight_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        backend=None,
        timeout_s=60.0,
    ) -> None:
        """Join the trainer's group as rank `rank_offset` + this worker's rank."""
        self.buckets = self.replay = None
        repair_zero_rows(self.get_model().parameters())  # of the first load
        self.last_seen = self.last_seen or digests_of(self.get_model())
        self.weight_group = stateless_init_process_group(
            master_address, master_port, rank_offset + self.rank, world_size, self.device, backend, timeout_s
        )

    @agreed
    def agree_on_weights(self, manifest: Manifest, bucket_bytes=BUCKET_BYTES) -> tuple[Manifest, str | None]:
        """Get ready to receive these weights. Returns them in the dtypes in which they have to travel, and
        why updates will be reload sessions (None: they will be replays).

        Raises one ValueError with all that is wrong if names or shapes differ from the last complete set's.
        """
        if self.manifest is not None:
            check_manifest(manifest, self.manifest)
        self.buckets = self.replay = None  # frees their memory for the new buckets
        because, copies = self.never_replay, {}
        if because is None:
            try:
                copies = record_copies(self.get_model(), manifest)
            except CannotReplay as reason:
                because = str(reason)
        self.buckets = Buckets(wire_manifest(manifest, copies), bucket_bytes, self.weight_group, self.device)
        if because is None:
            because = self._bind_replay(copies)
        return self.buckets.manifest, because

    def _bind_replay(self, copies: dict[str, list[Copy]]) -> str | None:
        """Replay into the engine's tensors where they are now; returns why not, if that cannot be."""
        self.replay, self.unproven = None, digests_of(self.get_model())
        try:
            self.replay = Replay(self.get_model(), copies, self.buckets)
            return None
        except CannotReplay as reason:
            return str(reason)

    @agreed
    def receive_weights(self, by_session: bool = False) -> dict:
        """Receive a complete set of weights as agreed on, by replay if there is one; blocks.

        Returns `path` ("replay" or "session") and `compare`, true of the first replay that has changed what
        is stored: `sync_weights_to_quantized_engine` repeats that sync by a session and compares.
        """
        if self.buckets is None:
            raise RuntimeError("no weights have been agreed on with this trainer: call agree_on_weights")
        model = self.get_model()
        with to_the_end(self.buckets.receive()) as numbers:
            if self.replay is not None and self.replay.addresses() != self.replay.bound_to:
                logger.warning("the engine's tensors have moved; replays write to where they are now")
                self._bind_replay(self.replay.copies)
            if self.session is not None and self.session.is_open:
                self.session.close()
            replaying = self.replay is not None and not by_session
            if replaying:
                for number in numbers:
                    self.replay(number)
            else:
                with contextlib.closing(ReloadSession(model, self.model_config)) as session:
                    session.load(self.buckets.put_together(numbers))
        self.manifest, self.session = self.buckets.manifest, None
        compare = replaying and self.unproven is not None and digests_of(model) != self.unproven
        return {"path": "replay" if replaying else "session", "compare": compare}

    @agreed
    def settle_path(self, because_not: str | None = None) -> None:
        """End the comparisons: replay from now on or, with a reason against it, never again."""
        self.unproven = None
        if because_not is not None:
            self.never_replay, self.replay = because_not, None

    @agreed
    def update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Receive one weight that rank 0 broadcasts now. The first call opens the update."""
        weight = torch.empty(tuple(shape), dtype=getattr(torch, dtype_name), device=self.device)
        broadcast(self.weight_group, weight, name)  # before any check: rank 0 is already sending
        if self.session is None or not self.session.is_open:
            self.session = ReloadSession(self.get_model(), self.model_config)
        try:
            self.session.load(iter([(name, weight)]))
        except Exception:
            self.session.close()
            raise

    @agreed
    def check_weights_changed(self) -> bool:
        """End the update that `update_weight` began, if any; has a stored byte changed since the last call?

        The first time: since this worker joined a group. Raises ValueError if a parameter got no weight.
        """
        if self.session is not None:
            if not self.session.is_open:
                raise ValueError("an `update_weight` has failed: send all weights again")
            self.session.close()
            if stale := self.session.stale():
                names = ", ".join(stale)
                raise ValueError(f"{len(stale)} engine parameters got no weight and are stale: {names}")
            self.session = None
        before, self.last_seen = self.last_seen, digests_of(self.get_model())
        return self.last_seen != before

    @agreed
    def stored_digests(self) -> dict[str, int]:
        """A 64-bit digest of every tensor that this worker's model stores, by name."""
        return digests_of(self.get_model())

    @agreed
    def zero_weights(self) -> None:
        """Set every byte that comes from weights to zero, so that what the next sync forgets will show.

        These are all parameters; the buffers whose last name is that of a weight that travels; and those that
        were not there before the first load, since vLLM has derived them.
        """
        from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

        model, travels = self.get_model(), {name.rpartition(".")[2] for name, _, _ in self.buckets.manifest}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            layer, leaf = owner(model, name)
            constants = before_loading(layer)[1].keys() | SKIP_LOAD_TENSORS  # as cosines of rotary embeddings
            if leaf in travels or leaf not in constants:
                for part in plain_tensors(name, tensor).values():
                    part.data.zero_()

    @agreed
    def inspect_weights(self) -> dict:
        """Account for every parameter; repairs zero rows of the first load.

        Sizes in GiB of this shard: `weights_gib`, of which `fp8_gib` (scales included); `bf16_weights_gib`,
        had all stayed BF16; `experts_gib` and `experts_fp8_gib`, those of routed experts. Counts of tensors:
        `fp8_linear_layers`. And `not_fp8`, names and shapes of weights (not biases) by why they are not.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        model, not_fp8, layers = self.get_model(), {}, 0
        names = ("weights_gib", "bf16_weights_gib", "fp8_gib", "experts_gib", "experts_fp8_gib")
        gib = dict.fromkeys(names, 0.0)
        repair_zero_rows(model.parameters())
        for name, weight in model.named_parameters():
            layer, leaf = owner(model, name)
            before, is_scale = before_loading(layer)[0].get(leaf, weight), "weight_scale" in leaf
            parts = plain_tensors(name, weight).values()
            loaded = 0 if is_scale else 2 * before.numel()
            stored = sum(part.nbytes for part in parts)
            of_expert = isinstance(layer, RoutedExperts)
            in_fp8 = is_scale or any(part.dtype == torch.float8_e4m3fn for part in parts)
            gib["weights_gib"] += stored / 2**30
            gib["bf16_weights_gib"] += loaded / 2**30
            if of_expert:
                gib["experts_gib"] += stored / 2**30
            if in_fp8:
                gib["fp8_gib"] += stored / 2**30
                if of_expert:
                    gib["experts_fp8_gib"] += stored / 2**30
                elif not is_scale:
                    layers += 1
            elif before.ndim > 1 and "bias" not in leaf:
                not_fp8.setdefault(why_not_fp8(layer, before.shape), []).append(
                    f"{name} {list(before.shape)}"
                )
        return {"rank": self.rank, "fp8_linear_layers": layers, "not_fp8": not_fp8, **gib}


def why_not_fp8(layer: torch.nn.Module, shape: torch.Size) -> str:
    """In a few words, for a weight that an FP8 engine stores otherwise."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(layer, RoutedExperts):
        return "routed experts"
    if isinstance(layer, (VocabParallelEmbedding, torch.nn.Embedding)):
        return "embeddings and heads"
    return "sizes that are no multiples of 16" if any(n % 16 for n in shape) else "not in the scheme"


def check_manifest(manifest: Manifest, expected: Manifest) -> None:
    """Raise one ValueError that lists every missing, unexpected, duplicate or misshapen weight."""
    found = {name: list(shape) for name, _, shape in manifest}
    known = {name: list(shape) for name, _, shape in expected}
    counts = Counter(name for name, _, _ in manifest)
    problems = [f"duplicate: {name}" for name, count in counts.items() if count > 1]
    problems += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in known]
    problems += [f"missing: {name} {shape}" for name, shape in known.items() if name not in found]
    for name, shape in found.items():
        if known.get(name, shape) != shape:
            problems.append(f"misshapen: {name} is {shape}, the engine's model has {known[name]}")
    if problems:
        raise ValueError(
            f"{len(problems)} weights do not fit the engine's model; send a model of the architecture and "
            "shapes that the engine was started with:\n  " + "\n  ".join(problems)
        )


def owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The layer that has a tensor, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def before_loading(layer: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's parameters and buffers as vLLM's loaders expect them: unquantized, on the meta device."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer).restore_metadata


# ----- 4. The buckets: both ends make the same plan from the same manifest --------------------------------


class Piece(NamedTuple):
    """Rows `row` to `end` of one weight in a bucket, and where they are (offset and size in bytes)."""

    name: str
    dtype: torch.dtype
    full_shape: list[int]
    row: int
    end: int
    offset: int
    nbytes: int

    def view(self, bucket: Tensor) -> Tensor:
        """The rows, as a view of their bucket (uint8)."""
        shape = [self.end - self.row, *self.full_shape[1:]] if self.full_shape else []
        return bucket[self.offset : self.offset + self.nbytes].view(self.dtype).view(shape)


def plan_buckets(manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> list[tuple[int, list[Piece]]]:
    """Split a manifest into (size in bytes, pieces), filling each bucket; weights may be cut between rows.

    >>> plan = plan_buckets([["a", "bfloat16", [3]], ["b", "bfloat16", [5, 16]]], 128)
    >>> [(piece.name, piece.row, piece.end, piece.offset) for piece in plan[0][1]]
    [('a', 0, 3, 0), ('b', 0, 3, 16)]
    >>> [(piece.name, piece.row, piece.end, piece.offset) for piece in plan[1][1]]
    [('b', 3, 5, 0)]
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
            pieces.append(Piece(name, dtype, list(shape), row, row + count, size, count * row_bytes))
            buckets.append((-(-(size + count * row_bytes) // 16) * 16, pieces))
            row += count
    return buckets


class Bucket(NamedTuple):
    """Bytes (uint8), and the pieces in them, each with a view of its own."""

    memory: Tensor
    pieces: list[tuple[Piece, Tensor]]


class Buckets:
    """Fixed memory for weights on their way: two buckets in turn; one travels while the other is worked on.

    Both ends work on buckets in the current stream and broadcast in a stream of their own (on the CPU both
    are nothing); the host waits for nothing until the end.
    """

    def __init__(self, manifest: Manifest, bucket_bytes: int, group, device: torch.device):
        self.manifest, self.group = manifest, group
        plan = plan_buckets(manifest, bucket_bytes)
        largest = max(size for size, _ in plan)
        two = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in plan[:2]]
        self.buckets: list[Bucket] = []
        for number, (size, pieces) in enumerate(plan):
            memory = two[number % 2][:size]
            self.buckets.append(Bucket(memory, [(piece, piece.view(memory)) for piece in pieces]))
        self.digests = torch.zeros(len(plan), dtype=torch.int64, device=device)
        self.streams = torch.get_device_module(device)
        self.wire = self.streams.Stream(priority=-1)
        self.events = []  # of the broadcasts of a sync: every bucket's, then that of the digests

    def names(self, number: int) -> str:
        """For messages: the bucket's number, its first and last weight."""
        if number == len(self.buckets):
            return "the digests"
        pieces = self.buckets[number].pieces
        first, last = pieces[0][0].name, pieces[-1][0].name
        return f"bucket {number + 1} of {len(self.buckets)} ({first} .. {last})"

    def start(self, tensor: Tensor) -> None:
        """Broadcast the next bucket, or at last the digests, after all that the current stream has to do."""
        what, event = self.names(len(self.events)), self.streams.Event()
        self.events.append(event)
        self.wire.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.wire):
            broadcast(self.group, tensor, what, self.wire)
            event.record()

    def finish(self, number: int) -> None:
        """Wait until a broadcast has ended."""
        wait_on_host(self.events[number], self.group, self.names(number))

    def send(self, weights: NamedTensors) -> None:
        """Rank 0: fill each bucket, cast to its dtypes, and broadcast it; digests come last."""
        self.events, weight = [], None
        for number, (memory, pieces) in enumerate(self.buckets):
            if number > 1:
                self.events[number - 2].wait()  # it had the same memory
            if number > 0:  # now, so that packing does not take the GPU just when the next broadcast starts
                self.digests[number - 1] = digest(self.buckets[number - 1].memory)
            sources = []
            for piece, view in pieces:
                if piece.row == 0:
                    name, weight = next(weights, ("no more weights", torch.empty(0)))
                    found, expected = (name, list(weight.shape)), (piece.name, piece.full_shape)
                    if found != expected:
                        why = "the weights have changed since `prepare_weights`"
                        raise ValueError(f"found {found}, expected {expected}: {why}")
                sources.append(weight if view.shape == weight.shape else weight[piece.row : piece.end])
            torch._foreach_copy_([view for _, view in pieces], sources)
            self.start(memory)
        self.digests[-1] = digest(memory)
        self.start(self.digests)
        for number in range(len(self.events)):
            self.finish(number)

    def receive(self) -> Iterator[int]:
        """Ranks 1..TP: yield the number of each bucket that has come in, then compare digests.

        Run it to the end, even after an error: the sender sends all buckets, then the digests.
        Raises ConnectionError if a bucket differs from what was sent; it names its first and last weight.
        """
        self.events, sent = [], torch.empty_like(self.digests)
        coming = [*(memory for memory, _ in self.buckets), sent]
        self.start(coming[0])
        for number, (memory, _) in enumerate(self.buckets):
            self.start(coming[number + 1])  # into the memory of the bucket before this one, which was used
            self.events[number].wait()
            self.digests[number] = digest(memory)
            yield number
        for number in range(len(self.events)):
            self.finish(number)
        if wrong := (sent != self.digests).nonzero().flatten().tolist():
            count = f"{len(wrong)} of {len(self.buckets)} buckets"
            names = ", ".join(map(self.names, wrong))
            raise ConnectionError(f"{count} came in with other bytes than were sent: {names}")

    def put_together(self, numbers: Iterator[int]) -> NamedTensors:
        """Ranks 1..TP: yield (name, tensor in memory of its own) of each weight from `receive`'s numbers."""
        whole = None
        for number in numbers:
            self.finish(number)  # vLLM's loaders make the host wait in any case
            for piece, view in self.buckets[number].pieces:
                if piece.row == 0:
                    whole = torch.empty(piece.full_shape, dtype=piece.dtype, device=view.device)
                (whole if view.shape == whole.shape else whole[piece.row : piece.end]).copy_(view)
                if piece.end == (piece.full_shape or [1])[0]:
                    yield piece.name, whole


# ----- 5. The replay: what a session would copy, learned once, done again without vLLM's loaders ----------


class CannotReplay(Exception):
    """Why vLLM's loading of this model cannot be written down as copies. A reload session is used instead."""


class Copy(NamedTuple):
    """From a view of a received weight to one of an engine's tensor, of the same sizes; all on meta."""

    source: Tensor
    target: Tensor
    tensor: str
    loaded: Tensor  # what `target` is a view of: the tensor as vLLM's loaders see it, unquantized


@contextlib.contextmanager
def as_loaders_see_it(model: torch.nn.Module) -> Iterator[None]:
    """Exchange every tensor of a vLLM model for the one that its loaders expect, on the meta device.

    The live tensors are put aside and put back as they were, whatever the loaders have done meanwhile.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    def on_meta(name: str, tensor: Tensor | None, layer: torch.nn.Module) -> Tensor | None:
        """The tensor without memory, with the loader that it had at first."""
        if tensor is None:  # a bias that a layer does not have
            return None
        tensor = restore_layer_refs(to_meta_tensor(tensor), layer)
        if hasattr(tensor, "weight_loader"):
            tensor.weight_loader = _get_original_loader(tensor)
        return tensor

    kept = [(layer, vars(layer).copy()) for layer in model.modules()]
    try:
        for layer, live in kept:
            for kind, seen in zip(("_parameters", "_buffers"), before_loading(layer)):
                others = {name: t for name, t in live[kind].items() if t is None or name in SKIP_TENSORS}
                vars(layer)[kind] = {name: on_meta(name, t, layer) for name, t in (others | seen).items()}
        model._do_torchao_reload = False  # or `load_weights` would open a session by itself
        yield
    finally:
        for layer, live in kept:
            vars(layer).clear()
            vars(layer).update(live)


class CopyRecorder(TorchFunctionMode):
    """While active, no `copy_` is done; `copies` gets (target, source) instead."""

    def __init__(self):
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not Tensor.copy_:
            return function(*args, **kwargs or {})
        self.copies.append(args[:2])
        return args[0]


def record_copies(model: torch.nn.Module, manifest: Manifest) -> dict[str, list[Copy]]:
    """What a reload session would copy of each weight, learned from weights without memory.

    The model stays as it is. Raises CannotReplay, with the reason, if the loaders do more than copy.
    """
    weights = {}
    for name, dtype, shape in manifest:
        weights[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    with as_loaders_see_it(model):
        tensors = named_tensors(model)
        try:
            with CopyRecorder() as recorder:
                model.load_weights(iter(weights.items()))
        except Exception as error:  # of any kind: they are vLLM's loaders for hundreds of models
            why = f"{type(error).__name__}: {error}"
            raise CannotReplay(f"vLLM's loaders want to see the weights: {why}") from error
        tensors |= named_tensors(model)  # loaders may register more

    weight_at = {storage(weight): name for name, weight in weights.items()}
    tensor_at = {storage(tensor): name for name, tensor in tensors.items()}
    copies: dict[str, list[Copy]] = {}
    for target, source in recorder.copies:
        weight, tensor = weight_at.get(storage(source)), tensor_at.get(storage(target))
        if weight and tensor:
            copy = Copy(source.expand(target.shape), target, tensor, tensors[tensor])
            copies.setdefault(weight, []).append(copy)
        elif weight:
            raise CannotReplay(f"vLLM's loaders do more with {weight} than copy it into the model")
        elif tensor:
            raise CannotReplay(f"what vLLM's loaders copy into {tensor} is computed, not a weight as it came")
    return copies


def named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones by each of their names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return dict(model.named_parameters(remove_duplicate=False)) | buffers


def wire_manifest(manifest: Manifest, copies: dict[str, list[Copy]]) -> Manifest:
    """Each weight in the dtype that it is copied into, if that is one and no wider; else as it is."""
    result = []
    for name, own, shape in manifest:
        wanted = {copy.target.dtype for copy in copies.get(name, [])}
        narrower = [dtype for dtype in wanted if dtype.itemsize <= getattr(torch, own).itemsize]
        result.append([name, dtype_name(narrower[0]) if len(wanted) == len(narrower) == 1 else own, shape])
    return result


class Stored(NamedTuple):
    """How a tensor is stored in FP8 row by row, whatever its shape: (rows, columns) and (rows, 1)."""

    qdata: Tensor
    scale: Tensor
    by_vllm: bool  # by vLLM's rule and not torchao's: see `Rows`


def stored_by_rows(live: dict[str, Tensor], name: str, loaded: Tensor) -> Stored | None:
    """By torchao's PerRow, or vLLM's `fp8_per_channel` (linear layers transposed, experts as they are)."""
    tensor, by_vllm = live[name], not isinstance(live[name], Float8Tensor)
    qdata, scale = (tensor, live.get(f"{name}_scale")) if by_vllm else (tensor.qdata, tensor.scale)
    if scale is None or qdata.dtype != torch.float8_e4m3fn:
        return None
    qdata = (qdata if qdata.is_contiguous() else qdata.mT).detach()
    shapes = qdata.shape, scale.shape
    if shapes != (loaded.shape, (*loaded.shape[:-1], 1)):
        return None
    if not (qdata.is_contiguous() and scale.is_contiguous()):
        return None
    return Stored(qdata.flatten(0, -2), scale.detach().flatten(0, -2), by_vllm)


class Replay:
    """A session's copies without vLLM's loaders: rows are quantized straight into the live tensors.

    Raises:
        CannotReplay: a tensor is stored in another form than rows in FP8, or than it was loaded in.
    """

    def __init__(self, model: torch.nn.Module, copies: dict[str, list[Copy]], buckets: Buckets):
        self.copies = copies
        live, stored = named_tensors(model), {}
        for copy in itertools.chain(*copies.values()):
            name, loaded = copy.tensor, copy.loaded
            if name not in live:
                raise CannotReplay(f"vLLM has no {name} any more")
            stored[name] = stored_by_rows(live, name, loaded)
            plain = not is_traceable_wrapper_subclass(live[name])
            same = (live[name].shape, live[name].dtype) == (loaded.shape, loaded.dtype)
            if stored[name] is None and not (plain and same):
                why = "neither as it loads it nor in FP8 by rows (the CPU packs, other schemes have blocks)"
                raise CannotReplay(f"vLLM stores {name} {why}")
        scales = [f"{name}_scale" for name, rows in stored.items() if rows and rows.by_vllm]
        self.places = [owner(model, name) for name in sorted([*stored, *scales])]
        self.bound_to = self.addresses()
        self.on_gpu = buckets.digests.is_cuda
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by bucket
        self.capturing = buckets.streams.Stream()
        self.steps = []  # for each bucket: what to quantize, and arguments of _foreach_copy_
        for _, pieces in buckets.buckets:
            rows, plain = [], []
            for piece, view in pieces:
                for copy in copies.get(piece.name, []):
                    bind(copy, piece, view, stored[copy.tensor] or live[copy.tensor], rows, plain)
            self.steps.append((batches(rows), tuple(zip(*plain))))

    def __call__(self, number: int) -> None:
        """Bucket `number` is in its memory. Done once as written, then as a CUDA graph."""
        if number in self.graphs:
            return self.graphs[number].replay()
        self._quantize_and_copy(number)
        if self.on_gpu:
            graph = torch.cuda.CUDAGraph()
            # On a stream: torch.cuda.graph() would wait for the device, without a limit.
            with torch.cuda.stream(self.capturing):
                graph.capture_begin(capture_error_mode="thread_local")
                self._quantize_and_copy(number)
                graph.capture_end()
            self.graphs[number] = graph

    def _quantize_and_copy(self, number: int) -> None:
        to_quantize, to_copy = self.steps[number]
        for batch in to_quantize:
            quantize_rows(batch)
        if to_copy:
            torch._foreach_copy_(*to_copy)

    def addresses(self) -> list[tuple[int, ...]]:
        """Where the tensors are now that are written to."""
        tensors = (plain_tensors(leaf, getattr(layer, leaf)) for layer, leaf in self.places)
        return [tuple(part.data_ptr() for part in parts.values()) for parts in tensors]


def bind(
    copy: Copy, piece: Piece, view: Tensor, stored: Stored | Tensor, rows: list[Rows], plain: list
) -> None:
    """Append what of a copy lies in a piece, as views of bucket and live tensor, to what a replay does.

    That is `Rows` to `rows`, or (target, source) to `plain`.
    """
    source, target, width = copy.source, copy.target, math.prod(piece.full_shape[1:])
    if piece.end - piece.row < (piece.full_shape or [1])[0]:  # cut between buckets
        first = source.storage_offset() // width
        along = [d for d in range(source.ndim) if source.shape[d] > 1 and source.stride(d) % width == 0]
        within = sum((source.shape[d] - 1) * source.stride(d) for d in range(source.ndim) if d not in along)
        if len(along) > 1 or 0 in source.stride() or source.storage_offset() % width + within >= width:
            raise CannotReplay(f"the rows of {piece.name} are taken in an order that cannot be cut")
        if along:
            step = source.stride(along[0]) // width
            start = max(0, -((first - piece.row) // step))
            end = min(source.shape[along[0]], -((first - piece.end) // step))
            if start >= end:
                return
            source, target = (tensor.narrow(along[0], start, end - start) for tensor in (source, target))
        elif not piece.row <= first < piece.end:
            return
    offset = view.storage_offset() + source.storage_offset() - piece.row * width
    if isinstance(stored, Tensor):
        if not stored.is_contiguous():
            raise CannotReplay(f"vLLM stores {copy.tensor} in another order than it loads it")
        source = view.as_strided(source.shape, source.stride(), offset)
        offset = stored.storage_offset() + target.storage_offset()
        plain.append((stored.data.as_strided(target.shape, target.stride(), offset), source))
        return
    columns = stored.qdata.shape[1]
    first, beside = divmod(target.storage_offset(), columns)
    if beside or target.shape[-1] != columns or not target.is_contiguous():
        raise CannotReplay(f"the rows of {copy.tensor} do not come one after another and whole")
    if view.dtype != torch.bfloat16 or source.ndim != 2 or source.stride(1) != 1:
        raise CannotReplay(
            f"{piece.name} travels as {view.dtype}, or is not taken by rows: no replay does that"
        )
    source = whole = view.as_strided(source.shape, source.stride(), offset)
    if stored.by_vllm:  # the scale is made from all columns, also of those for other workers
        length, step = piece.full_shape[-1], source.stride(0)
        before = copy.source.storage_offset() % length
        if step % length and len(source) > 1 or before + columns > length:
            raise CannotReplay(f"rows of {copy.tensor} are no parts of rows of {piece.name}")
        whole = view.as_strided((len(source), length), (step, 1), offset - before)
    span = slice(first, first + len(source))
    rows.append(Rows(source, whole, stored.qdata[span], stored.scale[span], stored.by_vllm))


# ----- 6. Bytes: digests, and rows quantized as torchao and vLLM do it ------------------------------------


def digests_of(model: torch.nn.Module) -> dict[str, int]:
    """A 64-bit digest of every tensor that a vLLM model stores, by name: parameters (and parts), buffers."""
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensors |= plain_tensors(name, tensor)
    digests = torch.stack([digest(tensor) for tensor in tensors.values()])
    return dict(zip(tensors, digests.tolist(), strict=True))


def plain_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that hold the bytes, by name: torchao's bytes and scales, or any other tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    plain = {}
    for part in tensor.__tensor_flatten__()[0]:
        plain |= plain_tensors(f"{name}.{part}", getattr(tensor, part))
    return plain


def digest(tensor: Tensor) -> Tensor:
    """64-bit checksum of a tensor's bytes, as an int64 scalar on its device: no copy to the host, no waiting.

    The sum over i of (2i + 1) word_i modulo 2^64, of the bytes as 64-bit words. Any one changed word changes
    it, and so do two swapped ones unless distance times difference is a multiple of 2^63. For accidents, not
    attackers.
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
    return (words * (2 * torch.arange(len(words)) + 1)).sum()


@triton.jit
def digest_kernel(words, count, total, BLOCK: tl.constexpr):
    """One program a block; sums of integers do not depend on their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + i, mask=i < count, other=0)
    tl.atomic_add(total, tl.sum(word * (2 * i + 1)))


class Rows(NamedTuple):
    """Rows of BF16 weights, and where they go as FP8 e4m3 bytes, with one FP32 scale for each.

    torchao 0.18's PerRow makes the scale from the columns that a worker gets, and rounds amax / 448 to BF16;
    rows of zeros get zero bytes and scale 1 (see `repair_zero_rows`). vLLM 0.32's `fp8_per_channel` makes it
    from whole rows, is not rounded, and at least 1 / (448 * 512).
    """

    source: Tensor  # (rows, columns of this worker)
    whole: Tensor  # (rows, columns) that the scale is made from
    qdata: Tensor  # as `source`
    scale: Tensor  # (rows, 1)
    by_vllm: bool

    @property
    def alike(self) -> tuple:
        """What is the same for all that one launch of the kernel quantizes."""
        aligned = not any(tensor.data_ptr() % 16 for tensor in (self.source, self.whole, self.qdata))
        return self.source.shape, self.source.stride(0), self.whole.shape[1], self.by_vllm, aligned


class Batch(NamedTuple):
    """Rows that are `alike`, as the experts of a layer are, and the addresses of their tensors, (n, 4)."""

    rows: list[Rows]
    addresses: Tensor


def batches(rows: list[Rows]) -> list[Batch]:
    """All rows, in as few batches as possible."""
    groups: dict[tuple, list[Rows]] = {}
    for some in rows:
        groups.setdefault(some.alike, []).append(some)
    result = []
    for group in groups.values():
        addresses = [[tensor.data_ptr() for tensor in some[:4]] for some in group]
        result.append(Batch(group, torch.tensor(addresses, device=group[0].source.device)))
    return result


def quantize_rows(batch: Batch) -> None:
    """Quantize, bit-identical to torchao's PerRow and vLLM's `fp8_per_channel` (see `Rows`)."""
    if batch.addresses.is_cuda:
        (count, columns), step, length, by_vllm, aligned = batch.rows[0].alike
        block, whole_block = triton.next_power_of_2(columns), triton.next_power_of_2(length)
        sizes = (step, columns, length, block, whole_block if length > columns else 0, by_vllm, aligned)
        warps = min(16, max(1, whole_block // 1024))
        quantize_rows_kernel[(count, len(batch.rows))](batch.addresses, *sizes, num_warps=warps)
        return
    for source, whole, qdata, scale, by_vllm in batch.rows:
        limit = torch.finfo(qdata.dtype).max
        amax_R1 = whole.abs().amax(dim=1, keepdim=True)
        if by_vllm:
            scale_R1 = (amax_R1.float() / limit).clamp(min=1 / (limit * 512))
        else:
            scale_R1 = (amax_R1 / limit).float()
        dead_R1 = scale_R1 == 0
        quotient_RC = (source.float() / scale_R1).clamp(-limit, limit)
        qdata.copy_(quotient_RC.masked_fill(dead_R1, 0).to(qdata.dtype))
        scale.copy_(scale_R1.masked_fill(dead_R1, 1))


@triton.jit
def quantize_rows_kernel(
    addresses,
    step,
    columns,
    length,
    BLOCK: tl.constexpr,
    WHOLE_BLOCK: tl.constexpr,  # 0: the worker has whole rows
    BY_VLLM: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes
):
    """One program a row, which stays in registers: it is read once (in part twice) and written once."""
    row, column, entry = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), addresses + 4 * tl.program_id(1)
    source = tl.load(entry).to(tl.pointer_type(tl.bfloat16))
    whole = tl.load(entry + 1).to(tl.pointer_type(tl.bfloat16))
    qdata = tl.load(entry + 2).to(tl.pointer_type(tl.float8e4nv))
    scale = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        source, whole = tl.multiple_of(source, 16), tl.multiple_of(whole, 16)
        qdata = tl.multiple_of(qdata, 16)
    inside = column < columns
    x = tl.load(source + row * step + column, mask=inside, other=0.0).to(tl.float32)
    seen = x
    if WHOLE_BLOCK > 0:
        at = tl.arange(0, WHOLE_BLOCK)
        seen = tl.load(whole + row * step + at, mask=at < length, other=0.0).to(tl.float32)
    row_scale = tl.div_rn(tl.max(tl.abs(seen)), 448.0)
    if BY_VLLM:
        row_scale = tl.maximum(row_scale, 1 / (448.0 * 512))
    else:
        row_scale = row_scale.to(tl.bfloat16).to(tl.float32)
    if tl.max((seen != seen).to(tl.int32)) > 0:
        row_scale = float("nan")  # tl.max ignores NaN, torch's amax does not
    dead = row_scale == 0.0
    quotient = tl.div_rn(x, tl.where(dead, 1.0, row_scale))
    quotient = tl.where(dead, 0.0, tl.clamp(quotient, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(qdata + row * columns + column, quotient.to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, tl.where(dead, 1.0, row_scale))


def as_bytes(tensor: Tensor) -> Tensor:
    """A flat uint8 view of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# ----- 7. The patches -------------------------------------------------------------------------------------


@functools.cache
def patch_libraries() -> None:
    """What a worker changes in torchao and vLLM, before it builds its model. Importing this module changes
    nothing.
    """
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass
    from vllm.model_executor.layers import utils

    @torch.library.custom_op("rlhf_online_quant::fastest_scaled_mm", mutates_args=("out",))
    def fastest_scaled_mm(
        out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, fast: bool
    ) -> None:
        """An operator of its own, because a compiled model does not know the number of rows until it runs."""
        if a.is_cuda and a.shape[0] <= 128:
            torch.ops._C.cutlass_scaled_mm(out, a, b, a_scale, b_scale, bias)  # vLLM's
        else:
            options = dict(bias=bias, out_dtype=out.dtype, use_fast_accum=fast, out=out)
            torch._scaled_mm(a, b, a_scale, b_scale, **options)

    def scaled_mm(a, a_scale, b, b_scale, output_dtype, output_scale=None, bias=None, use_fast_accum=False):
        """Activations (M, K) by weights (K, N), both FP8, with scales (M, 1) and (1, N); BF16 (M, N)."""
        output = a.new_empty(a.shape[0], b.shape[1], dtype=output_dtype)
        fastest_scaled_mm(output, a, b, a_scale, b_scale, bias, use_fast_accum)
        return output

    # Why: for a scale per row, cuBLAS takes one tile of 128 x 128, which leaves most of a GPU idle in a
    # decoding step; vLLM's CUTLASS kernels are faster at up to 128 rows (`tests/bench_rollout.py` compares
    # whole engines). Delete when: torch._scaled_mm is as fast at 1 to 128 rows.
    float8_tensor.addmm_float8_unwrapped_inference = scaled_mm

    @Float8Tensor.implements(torch.ops.aten.empty_like.default)
    def _(function, types, args, kwargs):
        # Why: without it vLLM cannot store what it has compiled, and every start of an engine compiles anew.
        # Delete when: torchao's Float8Tensor has `empty_like` (0.18 has not).
        return args[0]._apply_fn_to_data(lambda tensor: function(tensor, **kwargs))

    def use_plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    # Why: on a CPU with AVX-512 vLLM computes with packed copies of BF16 weights, not all of which a session
    # makes anew (those of tied heads, biases and convolutions stay old); with AVX2 alone it packs nothing.
    # Delete when: a session makes all of them anew.
    utils.dispatch_cpu_unquantized_gemm = use_plain_linear

    # Why: vLLM pads layers to multiples of 16 for this kernel and then sets their loader once more, which
    # its own `set_weight_attrs` forbids ("Overwriting existing tensor attribute: weight_loader").
    # Delete when: an engine whose linear layer has 8 outputs starts with `fp8_per_channel`.
    cutlass.set_weight_attrs = lambda weight, attributes: vars(weight).update(attributes)
