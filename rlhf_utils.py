"""Full-precision weights go over the wire; an FP8 vLLM engine quantizes them on arrival.

    trainer   rank 0       send_weights()                     packs buckets, broadcasts, broadcasts their digests
    engine    ranks 1..TP  WorkerExtension.receive_weights()  receives, compares digests, reloads, quantizes

vLLM adds `WorkerExtension` to each of its workers (`worker_extension_cls="rlhf_utils.WorkerExtension"`); its methods
are called by name with `collective_rpc`. Three rules decide the code:

1. One reload session for a whole update. `model.load_weights` outside a session rebuilds every layer that it
   touches from uninitialized memory, so a call per parameter destroys a quantized model.
2. A rank never leaves a broadcast early (`use_all`). Whatever fails while loading is kept until the last bucket
   has come in; otherwise the sender waits for ever.
3. All ranks agree on errors (`agreed`). One reply too many in vLLM's executor is taken for the answer to the next call.

vLLM is imported where it is used: the trainer process starts without it.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)
BUCKET_BYTES = 256 * 2**20
Manifest = list[list]  # [[name, dtype name such as "bfloat16", shape], ...] in the order of sending
Weights = list[tuple[str, torch.Tensor]]  # checkpoint names and full tensors, what vLLM's loaders take


# ----- The group: rank 0 is the trainer, ranks 1..TP are the engine's workers ----------------------------------------


class GlooGroup:
    """Broadcasts over TCP, for CPU tensors and, through host memory, for CUDA tensors."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, address: str, timeout: timedelta):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        """Send `tensor` (contiguous, any dtype) from rank `src` to the same tensor of every other rank; blocks."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        data = as_bytes(tensor)
        host = data.cpu()  # `data` itself if that is on the CPU
        self.gloo.broadcast([host], options).wait()
        data.copy_(host)


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
        timeout_s: seconds to wait for the other ranks, and for each gloo broadcast. NCCL broadcasts have no timeout.
        listen_socket: rank 0 may bring a socket that listens already, so that no other program can take the port.

    Raises:
        TimeoutError: not all ranks arrived in time.
        RuntimeError: NCCL is off or cannot be loaded (vLLM's communicator would then do nothing, silently).
    """
    device, timeout = torch.device(device), timedelta(seconds=timeout_s)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # NCCL wants to know which
    serve = {}
    if rank == 0:
        listen_socket = listen_socket or socket.create_server((master_address, master_port))
        serve = {"master_listen_fd": listen_socket.detach()}
    try:
        store = dist.TCPStore(master_address, master_port, world_size, rank == 0, timeout, use_libuv=False, **serve)
    except dist.DistStoreError as error:
        raise TimeoutError(
            f"rank {rank} waited {timeout_s:g} s at {master_address}:{master_port} for a group of {world_size}: {error}"
        ) from error
    if (backend or ("nccl" if device.type == "cuda" else "gloo")) == "gloo":
        with socket.create_connection((master_address, master_port), timeout_s) as probe:
            own_address = probe.getsockname()[0]  # the address by which this rank reaches rank 0
        return GlooGroup(store, rank, world_size, own_address, timeout)

    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import unpinned_nccl_env

    if rank == 0:
        store.set("nccl_id", bytes(NCCLLibrary().ncclGetUniqueId().internal))
    with unpinned_nccl_env():  # the settings that vLLM pins for its workers are not the trainer's
        group = PyNcclCommunicator.from_unique_id_bytes(store.get("nccl_id"), rank, world_size, device)
    if group.disabled:
        raise RuntimeError(f"rank {rank}: NCCL is disabled in vLLM (is VLLM_DISABLE_PYNCCL set?), weights cannot flow")
    group.store = store  # the other ranks may still be reading it
    return group


# ----- What travels: a manifest, buckets, digests. Both ends make the same plan from the same manifest. ---------------


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and saved buffers of a Hugging Face model, each once: a tied head goes by the embedding's name."""
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), (name, tensor))
    return dict(names.values())


def make_manifest(model: torch.nn.Module, dtype: torch.dtype) -> Manifest:
    """Name, wire dtype (`dtype`, the engine's) and shape of every weight, in sending order."""
    return [[name, dtype_name(dtype), list(weight.shape)] for name, weight in named_weights(model).items()]


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


class Slot(NamedTuple):
    """Where one weight lies in its bucket (offset and size in bytes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The weight, as a view of its bucket (uint8)."""
        return bucket[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def plan_buckets(manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> list[tuple[int, list[Slot]]]:
    """Split a manifest into (size in bytes, slots) of at most `bucket_bytes`; a larger weight gets its own bucket.

    >>> plan_buckets([["a", "bfloat16", [3]], ["b", "bfloat16", [8]]], 1024)[0][1][1].offset  # 6 bytes, aligned to 16
    16
    """
    buckets: list[tuple[int, list[Slot]]] = []
    for name, dtype, shape in manifest:
        nbytes = math.prod(shape) * getattr(torch, dtype).itemsize
        aligned = -(-nbytes // 16) * 16
        size, slots = buckets.pop() if buckets and buckets[-1][0] + aligned <= bucket_bytes else (0, [])
        slots.append(Slot(name, getattr(torch, dtype), tuple(shape), size, nbytes))
        buckets.append((size + aligned, slots))
    return buckets


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """64-bit checksum of a tensor's bytes, as an int64 scalar on its device: no copy to the host, no synchronization.

    The bytes are read as a matrix of 64-bit words; sums of rows and of columns, weighted by position, are added modulo
    2^64. It tells apart tensors that hold the same bytes in another order. It is meant for accidents, not attackers.
    """
    data = as_bytes(tensor)
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = data.view(torch.int64)
    columns = 256  # few: CUDA's sum over rows takes scratch memory for each
    whole = words.numel() // columns * columns
    matrix, rest = words[:whole].view(-1, columns), words[whole:]
    return sum(
        (sums * torch.arange(seed, seed + 2 * sums.numel(), 2, device=data.device)).sum()
        for seed, sums in ((1, matrix.sum(0)), (8191, matrix.sum(1)), (3, rest))
    )


def send_weights(model: torch.nn.Module, manifest: Manifest, group, device: torch.device, bucket_bytes: int) -> int:
    """Rank 0: cast and pack each bucket, broadcast it, and at the end broadcast the digests of what was sent.

    `device` is the model's. All runs on one stream, so a bucket can take the last one's memory. Returns how many.
    """
    weights, digests = named_weights(model), []
    for size, slots in plan_buckets(manifest, bucket_bytes):
        bucket = torch.empty(size, dtype=torch.uint8, device=device)
        for slot in slots:
            slot.view(bucket).copy_(weights[slot.name].detach())
        group.broadcast(bucket, src=0)
        digests.append(digest(bucket))
        del bucket  # before the next is made: both at once would be the peak
    group.broadcast(torch.stack(digests), src=0)
    return len(digests)


def receive_buckets(manifest: Manifest, group, device: torch.device, bucket_bytes: int) -> Iterator[Weights]:
    """Ranks 1..TP: yield the weights of each bucket, then compare what came in with the sender's digests.

    The order of collectives is the sender's: every bucket, then the digests. Run it to the end, even after an error.
    Raises ValueError if a bucket differs from what was sent; it names the bucket's first and last weight.
    """
    plan, digests = plan_buckets(manifest, bucket_bytes), []
    for size, slots in plan:
        bucket = torch.empty(size, dtype=torch.uint8, device=device)
        group.broadcast(bucket, src=0)
        digests.append(digest(bucket))
        yield [(slot.name, slot.view(bucket)) for slot in slots]
        del bucket
    received = torch.stack(digests)
    sent = torch.empty_like(received)
    group.broadcast(sent, src=0)
    if wrong := (sent != received).nonzero().flatten().tolist():
        spans = [f"bucket {i} ({plan[i][1][0].name} .. {plan[i][1][-1].name})" for i in wrong]
        raise ValueError(f"{len(wrong)} of {len(plan)} buckets came in with other bytes than were sent: {spans}")


def use_all(buckets: Iterator[Weights], use: Callable[[Weights], None]) -> int:
    """Call `use` with each bucket; after an error go on receiving, and raise it at the end. Returns how many came."""
    failure, count = None, 0
    for weights in buckets:
        count += 1
        try:
            if failure is None:
                use(weights)
        except Exception as error:
            failure = error
        del weights  # or this bucket would live on while the next one comes in
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
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # It warns of layers without weights in any checkpoint, such as tied heads; `stale` below finds real gaps.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        with self._vllm_config():
            finalize_layerwise_reload(self.model, self.worker.model_config)
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "weight"):
                # A tied head is no layer of its own to the session; on CPU it would go on using a packed old copy.
                module.quant_method.process_weights_after_loading(module)
        repair_zero_rows(self.model.parameters())
        if complete:
            check_manifest(self.received, self.worker.expected_weights)
            if stale := sorted(self.parameters - self.loaded):
                raise ValueError(f"{len(stale)} engine parameters got no weight and are stale: {', '.join(stale)}")


def repair_zero_rows(parameters: Iterable[torch.Tensor]) -> int:
    """Give FP8 rows whose scale is 0 zero bytes and scale 1, in place; returns how many.

    torchao 0.18 divides an all-zero row (or one so small that amax / 448 underflows) by its scale of 0: NaN.
    """
    repaired = 0
    for weight in filter(is_float8, parameters):
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

    fp8, unquantized = [], {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (LinearBase, ParallelLMHead)) or weight is None:
            continue
        if is_float8(weight):
            fp8.append(weight)
        elif isinstance(module, ParallelLMHead):
            unquantized.setdefault("vLLM quantizes no output heads with torchao", []).append(name)
        elif any(size % 16 for size in weight.shape):
            unquantized.setdefault("a shard dimension is no multiple of 16", []).append(f"{name} {tuple(weight.shape)}")
        else:
            unquantized.setdefault("quantization is off for it", []).append(name)
    return {
        "fp8_linear_layers": len(fp8),
        "unquantized_linear_layers": sum(map(len, unquantized.values())),
        "unquantized": unquantized,
        "weights_gib": sum(t.nbytes for p in model.parameters() for t in plain_tensors(p).values()) / 2**30,
        "bf16_weights_gib": sum(2 * p.numel() for p in model.parameters()) / 2**30,
        "fp8_linear_gib": sum(w.qdata.nbytes + w.scale.nbytes for w in fp8) / 2**30,
        "bf16_linear_gib": sum(2 * w.numel() for w in fp8) / 2**30,
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
        if is_float8(actual):
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
        errors = [None] * group.world_size
        dist.all_gather_object(errors, error, group=group.cpu_group)
        if any(errors) and group.rank_in_group == group.world_size - 1:
            failed = "; ".join(f"engine rank {rank}: {e}" for rank, e in enumerate(errors) if e)
            raise RuntimeError(f"{method.__name__} failed. {failed}")
        return result

    return call


class WorkerExtension:
    """What a vLLM worker can do besides generating. Call by name: `llm.collective_rpc("method", args=(...))`.

    Two ways to bring new weights, both quantized on arrival:
      - `receive_weights(manifest)`: everything in one call, against `send_weights` on rank 0;
      - `update_weight(name, dtype_name, shape)` for each weight beside its broadcast, then `check_weights_changed()`.
    """

    weight_group = None
    reload_session: ReloadSession | None = None
    last_digests: torch.Tensor | None = None
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
        rank = rank_offset + self.rank
        self.weight_group = stateless_init_process_group(
            master_address, master_port, rank, world_size, self.device, backend, timeout_s
        )

    @agreed
    def inspect_quantization(self) -> dict:
        """Prove at start-up what is FP8 (see `inspect_linear_layers`); repairs zero rows of the first load."""
        repaired = repair_zero_rows(self.get_model().parameters())
        self.last_digests = self._digests()
        return inspect_linear_layers(self.get_model()) | {"rank": self.rank, "zero_rows_repaired": repaired}

    @agreed
    def check_weight_manifest(self, manifest: Manifest) -> None:
        """Raise one ValueError with all that is wrong, before a byte moves."""
        check_manifest(manifest, self.expected_weights)

    @agreed
    def receive_weights(self, manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> dict:
        """Receive a complete set of weights into one reload session. Blocks until rank 0 has sent everything."""
        if self.reload_session is not None:  # a per-parameter update that was never ended
            self.reload_session.close(complete=False)
        self.reload_session, before = ReloadSession(self), reset_peak_memory(self.device)
        buckets = receive_buckets(manifest, self.weight_group, self.device, bucket_bytes)
        try:
            matched = use_all(buckets, self.reload_session.load)
        except Exception:
            self._end_update(complete=False)
            raise
        self._end_update()
        extra_gib = peak_memory_gib(self.device, before)
        return {"buckets_matched": matched, "changed": self.weights_changed, "extra_gib": extra_gib}

    @agreed
    def verify_weights(self, manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> dict:
        """Receive the weights once more, only to compare; see `ShardVerifier`."""
        verifier = ShardVerifier(self.get_model())
        use_all(receive_buckets(manifest, self.weight_group, self.device, bucket_bytes), verifier.check)
        different = verifier.different + [f"{name} (never sent)" for name in verifier.unseen]
        return {"compared": verifier.compared, "different": different, "hidden": verifier.hidden}

    @agreed
    def update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Receive one weight that rank 0 broadcasts now. The first call opens the update."""
        weight = torch.empty(tuple(shape), dtype=getattr(torch, dtype_name), device=self.device)
        self.weight_group.broadcast(weight, src=0)  # before any check: rank 0 is already sending
        if self.reload_session is None:
            self.reload_session = ReloadSession(self)
        try:
            self.reload_session.load([(name, weight)])
        except Exception:
            self._end_update(complete=False)
            raise

    @agreed
    def check_weights_changed(self) -> bool:
        """End an update that `update_weight` began, and tell whether the last update changed any stored byte.

        Compares digests of this rank's FP8 bytes, scales and plain parameters before and after.
        """
        if self.reload_session is not None:
            self._end_update()
        return self.weights_changed

    def _end_update(self, complete: bool = True) -> None:
        session, self.reload_session = self.reload_session, None
        session.close(complete)
        digests = self._digests()
        self.weights_changed = self.last_digests is None or not torch.equal(digests, self.last_digests)
        self.last_digests = digests

    def _digests(self) -> torch.Tensor:
        tensors = [t for parameter in self.get_model().parameters() for t in plain_tensors(parameter).values()]
        return torch.stack([digest(tensor) for tensor in tensors])


# ----- Small things ---------------------------------------------------------------------------------------------------


def is_float8(tensor: torch.Tensor) -> bool:
    """Is it torchao's FP8 tensor (bytes in `qdata`, one float32 per row in `scale`)?"""
    from torchao.quantization import Float8Tensor

    return isinstance(tensor, Float8Tensor)


def plain_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that hold the bytes: {"qdata": ..., "scale": ...} of a Float8Tensor, {"": tensor} otherwise."""
    return {"qdata": tensor.qdata, "scale": tensor.scale} if is_float8(tensor) else {"": tensor}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def reset_peak_memory(device: torch.device) -> int:
    """Bytes allocated on a CUDA device now, from which `peak_memory_gib` counts; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory_gib(device: torch.device, before: int) -> float | None:
    """GiB that were allocated at most on top of `before`; None where nothing counts it (CPU)."""
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else None
