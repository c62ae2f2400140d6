"""Weight sync for RL: a full-precision trainer, and vLLM engines that quantize its weights to FP8 on arrival.

This file is the whole library: take it, and read part 1. A controller, such as rlhf_online_quant.py, has Ray
handles of a trainer, which is a `WeightSender`, and of an engine, which is a `MyLLM`, or of several:

    join_group(trainer, engine)                             # one NCCL group; gloo if any rank is on a CPU
    prove_fp8(engine)                                       # raises if a worker holds no weight in FP8
    prove_sync(trainer, engine)                             # raises if syncs of this model are not right
    for every step:
        ...                                                 # the engine generates, the trainer learns
        sync_weights_to_quantized_engine(trainer, engine)   # one broadcast of all weights

    trainer   rank 0       WeightSender      prepare_weights  agree_on_weights  send_weights
    workers   ranks 1..TP  WorkerExtension                    agree_on_weights  receive_weights

Weights take one of two paths into an engine. A *session* is vLLM's own reload: its loaders slice, fuse and
quantize. A *replay* does again what a session would copy, recorded once, straight into the live FP8 tensors.
The proof decides which of them serves, alone. Three rules: weights come in one session or one replay, because
outside of them `model.load_weights` leaves uninitialized memory; no worker leaves a broadcast early
(`to_the_end`), and all agree on errors (`collective`); none waits for ever (`Buckets.finish`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import re
import socket
import sys
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import ray
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torchao.quantization import Float8Tensor
from torchao.quantization.quantize_.workflows.float8 import float8_tensor
from transformers.core_model_loading import revert_weight_conversion
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import get_world_group
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor import model_loader
from vllm.model_executor.kernels.linear.scaled_mm import cutlass
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization import torchao as vllm_torchao
from vllm.model_executor.model_loader.reload import layerwise
from vllm.utils.nccl import unpinned_nccl_env
from vllm.utils.torch_utils import set_default_torch_dtype

logger = logging.getLogger(__name__)
BUCKET_BYTES = 256 * 2**20
Manifest = list[list]  # [[name, dtype name such as "bfloat16", shape], ...] in the order of sending
NamedTensors = Iterator[tuple[str, Tensor]]
NOT_AGREED = "no weights have been agreed on: call prepare_weights and agree_on_weights first"
PROMPTS = ["Hello, my name is", "The president of the United States is"]
PROMPTS += ["The capital of France is", "The future of AI is"]


# ----- 1. The controller's calls, and the engine that they drive --------------------------------------------
ACTORS: dict[str, ray.ActorID] = {}  # of those that have joined a group, by their names in messages


def join_group(train_model, quantized_llm, *, backend: str | None = None, timeout_s: float = 30.0) -> None:
    """Wait until all have loaded; trainer (rank 0) and workers (engine by engine) become one group.

    `backend` is "nccl" or "gloo", by default NCCL where every rank has a GPU. Args, here and below:
        train_model: handle of the trainer's actor; of a sharded trainer a list of all, the sender first.
        quantized_llm: handle of the engine's actor, or a list of several.
        timeout_s: seconds for each phase; ten times that where something loads or answers."""
    trainer, engines, rank = as_list(train_model)[0], as_list(quantized_llm), 1
    mine = {handle._actor_id for handle in [*as_list(train_model), *engines]}
    for name in [name for name, actor in ACTORS.items() if actor not in mine]:
        del ACTORS[name]  # of a group before, of which somebody may have died
    one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    rendezvous = trainer.open_rendezvous.remote("127.0.0.1" if one_node else None)
    loaded = [rendezvous, *[llm.get_workers.remote() for llm in engines]]
    (address, port, device), *workers = wait(loaded, 10 * timeout_s, "starting trainer and engine")
    on_gpus = {device, *(device for _, device in workers)} == {"cuda"}
    backend, world_size = backend or ("nccl" if on_gpus else "gloo"), 1 + sum(count for count, _ in workers)
    rest = (world_size, backend, timeout_s / 2)  # the ranks know more than the controller: they speak first
    joining = [trainer.init_weight_update_group.remote(address, port, *rest)]
    ACTORS["trainer (rank 0)"] = trainer._actor_id
    for llm, (count, _) in zip(engines, workers, strict=True):
        ACTORS[f"engine (rank {', '.join(map(str, range(rank, rank + count)))})"] = llm._actor_id
        joining += on_workers([llm], "init_weight_update_group", address, port, rank, *rest)
        rank += count
    wait(joining, timeout_s, f"joining the {backend} group of {world_size}")


def prove_fp8(quantized_llm, *, expect_fp8: bool = True, timeout_s: float = 30.0) -> list[dict]:
    """Print and return what each worker holds (`inspect_weights`). Raises ValueError if nothing is in FP8."""
    ranks = sum(wait(on_workers(as_list(quantized_llm), "inspect_weights"), timeout_s, "inspecting it"), [])
    for number, rank in enumerate(ranks, start=1):
        line = "{fp8_linear_layers} linear layers in FP8, {fp8_gib:.4f} of {weights_gib:.4f} GiB of weights"
        tell(f"worker (rank {number}): {line.format(**rank)}, in BF16 {rank['bf16_weights_gib']:.4f} GiB")
    for kind, names in ranks[0]["not_fp8"].items():
        advice = "; --quantization fp8_per_channel has them" if expect_fp8 and kind == "RoutedExperts" else ""
        tell(f"  not in FP8: {kind}: {some(names)}{advice}")
    if expect_fp8 and not all(rank["fp8_gib"] for rank in ranks):
        fits = "a --quantization to FP8, and shards whose dimensions are multiples of 16"
        raise ValueError(f"a worker has no weight in FP8; expected {fits}; or type --quantization none")
    return ranks


def sync_weights_to_quantized_engine(
    train_model, quantized_llm, *, bucket_bytes: int = BUCKET_BYTES, timeout_s: float = 30.0
) -> dict:
    """Bring engines to the trainer's weights: broadcast, quantization on arrival, digests, cache reset.

    Returns `path` ("replay" or "session"), `bytes` on the wire, `seconds` from the call to the reset prefix
    cache, `sender_s` of the broadcast, `gb_per_s` (1e9). Raises what `wait` does: what is wrong with which
    weight on which rank, who died or is silent. If a broadcast does not end well, the engine is *torn*."""
    trainers, engines, start = as_list(train_model), as_list(quantized_llm), time.perf_counter()
    find_agreement(trainers, engines, bucket_bytes, timeout_s)
    return bring_weights(trainers, engines, timeout_s, start=start)


# Moves of the proof: what is set to zero, whose weights come (the trainer's own or others), by which path.
REPLAYS = [("stored", "own", "replay"), ("", "others", "replay"), ("all", "others", "session")]
REPLAYS += [("", "own", "replay")]
SESSIONS = [("all", "own", "session"), ("", "others", "session"), ("", "own", "session")]


def prove_sync(
    train_model, quantized_llm, prompts=PROMPTS, max_tokens=32, *, bucket_bytes=BUCKET_BYTES, timeout_s=30.0
) -> dict:
    """Prove, before the first step, that syncs make an engine what vLLM's own loading makes it, or raise.

    Trainer and engines have started from the same checkpoint. Its weights, and others that the trainer makes
    of them on their way (`Buckets.send`), come in turn. Each time either are there, all that the engine's
    model reaches (`Reached`, by digests) and its greedy answers to `prompts` must be the same; with its own,
    as at the start. If replays fail, sessions are to serve, and prove the same of themselves.

    Returns what a sync does, of the last one; `because` (why no replay); how many `tensors` and `answers`
    were compared, how many tensors `changed` with the weights; `proof_s` (seconds); the answers `before`."""
    trainers, engines, start = as_list(train_model), as_list(quantized_llm), time.perf_counter()
    if any(wait([llm.get_weights_version.remote() for llm in engines], timeout_s, "reading the version")):
        raise RuntimeError("prove_sync needs a cold start, and an engine has been updated: start it anew")
    seen = {"own": observe(engines, timeout_s, prompts, max_tokens)}

    def go_through(moves: list[tuple[str, str, str]]) -> dict:
        seen.pop("others", None)
        for zero, weights, path in moves:
            if zero:
                wait(on_workers(engines, "zero_weights", zero), timeout_s, "setting weights to zero")
            sync = bring_weights(trainers, engines, timeout_s, weights == "others", path == "session")
            if weights not in seen:
                seen[weights] = observe(engines, timeout_s)
            elif different := differences(engines, seen[weights], timeout_s):
                raise RuntimeError(f"after a {path} these are not as they were before: {some(different)}")
        return sync

    because = find_agreement(trainers, engines, bucket_bytes, timeout_s)
    try:
        try:
            sync = None if because else go_through(REPLAYS)
        except RuntimeError as error:  # if it says nothing of the model, sessions will not do either
            because = str(error)
            tell(f"Weight syncs are reload sessions, because {because}")
        if because:
            wait(on_workers(engines, "give_up_replays", because), timeout_s, "settling on sessions")
            sync = go_through(SESSIONS)
    except Exception as error:
        on_workers(engines, "zero_weights")  # as soon as they can, before they answer: they may hold others
        if not isinstance(error, RuntimeError):
            raise
        raise RuntimeError(f"this model cannot be synced: {error}. No replay, because {because}") from error
    own, others = ([engine["digests"] for engine in seen[weights]] for weights in ("own", "others"))
    found = {
        "verified": True,
        "because": because,
        "tensors": sum(map(len, own)),
        "changed": sum(one[name] != other.get(name) for one, other in zip(own, others) for name in one),
        "answers": sum(len(engine["answers"]) for engine in seen["own"] if engine["repeatable"]),
        "proof_s": time.perf_counter() - start,
        "before": seen["own"][0]["answers"],
    }
    if not found["changed"]:
        raise RuntimeError("this proves nothing: other weights have changed no tensor of the engine's")
    line = "Proved by {path} in {proof_s:.1f} s: set to zero and synced, and again behind other weights, the "
    line += "engine is what it was: {tensors} tensors ({changed} follow the weights), {answers} answers"
    tell(line.format(**sync | found))
    return sync | found


def find_agreement(trainers: list, engines: list, bucket_bytes: int, timeout_s: float) -> str | None:
    """Check the trainer's weights; agree on them if they are new. Returns why not by replays, if known."""
    preparing = [trainer.prepare_weights.remote(bucket_bytes) for trainer in trainers]
    manifest = wait(preparing, timeout_s, "checking the trainer's weights")[0]
    if manifest is None:
        return None
    asked, doing = on_workers(engines, "agree_on_weights", manifest, bucket_bytes), "agreeing on the weights"
    manifests, reasons = zip(*sum(wait(asked, timeout_s, doing), []), strict=True)
    if any(manifest != manifests[0] for manifest in manifests):
        raise RuntimeError("the workers want the same weights in other dtypes: start all engines alike")
    wait([trainers[0].agree_on_weights.remote(manifests[0], bucket_bytes)], timeout_s, doing)
    because = "; ".join(sorted(set(filter(None, reasons)))) or None
    tell(f"Agreed on {len(manifest)} weights" + (f"; not by replays, because {because}" if because else ""))
    return because


def bring_weights(trainers, engines, timeout_s: float, others=False, by_session=False, start=None) -> dict:
    """One broadcast of all weights, or of others made from them; returns what a sync reports."""
    start = start or time.perf_counter()
    sending = [trainer.send_weights.remote(others) for trainer in trainers]
    receiving = on_workers(engines, "receive_weights", by_session)
    patience_s = timeout_s / 2 + 6  # a rank whose peer has died knows by then in which bucket that was
    (size, sender_s), *results = wait([*sending, *receiving], timeout_s, "broadcasting weights", patience_s)
    path = "session" if "session" in sum(results[len(trainers) - 1 :], []) else "replay"
    seconds = time.perf_counter() - start
    return dict(bytes=size, path=path, sender_s=sender_s, seconds=seconds, gb_per_s=size / seconds / 1e9)


def observe(engines: list, timeout_s: float, prompts=None, max_tokens=32, seen=None) -> list[dict]:
    """`MyLLM.observe` of every engine; without `prompts` they are asked what they were asked last."""
    pairs = zip(engines, seen or [None] * len(engines), strict=True)
    calls = [llm.observe.remote(prompts, max_tokens, one) for llm, one in pairs]
    found = wait(calls, 10 * timeout_s, "reading the engine's tensors and answers")
    if prompts and not all(engine["repeatable"] for engine in found):
        tell("This engine does not answer the same twice: only its tensors are compared")
    return found


def differences(engines: list, seen: list[dict], timeout_s: float) -> list[str]:
    """Names of the tensors that are not as `seen`; if all are, prompts that are answered differently."""
    found = []
    for i, (now, then) in enumerate(zip(observe(engines, timeout_s, seen=seen), seen, strict=True)):
        wrong = sorted({name for name, _ in now["digests"].items() ^ then["digests"].items()})
        if not wrong and then["repeatable"]:
            pairs = zip(now["answers"], then["answers"], strict=True)
            wrong = [f"the answer to {old['prompt']!r}" for new, old in pairs if new != old]
        found += [f"{what} (engine {i})" for what in wrong]
    return found


def as_list(handles) -> list:
    """One handle, or a list of them."""
    return handles if isinstance(handles, list) else [handles]


def on_workers(engines: list, method: str, *args) -> list:
    """Handles of calls of a method of every worker of every engine."""
    return [llm.collective_rpc.remote(method, args=args) for llm in engines]


WARNED: set[str] = set()  # what `only_told` has warned of


@contextlib.contextmanager
def only_told(what: str) -> Iterator[None]:
    """What only tells of the run, and fails, does not end it: one warning."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if what not in WARNED:
            print(f"Warning: {what} fails, the run goes on: {error!r}", file=sys.stderr, flush=True)
        WARNED.add(what)


tell = only_told("printing")(print)  # to a pipe, say, that nobody reads any more


def some(names: list[str]) -> str:
    """Names for a message, not too many of them."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def wait(refs: list, timeout_s: float, doing: str, patience_s: float = 0.0) -> list:
    """`ray.get(refs)` with a limit, whose one error names all actors that failed, died or are silent.

    Raises RuntimeError; ConnectionError if one died; TimeoutError. After a failure others have 7 more
    seconds, and `patience_s` from the start on, because what fails first is not always the cause."""
    start, pending, results, failures, died = time.monotonic(), list(refs), {}, [], False
    deadline, next_sign = start + timeout_s, start + 10
    names = {actor: name for name, actor in ACTORS.items()}
    who = {ref: names.get(ref.task_id().actor_id(), "Ray, or an actor in no group") for ref in refs}
    while pending and (left := deadline - time.monotonic()) > 0:
        done, pending = ray.wait(pending, timeout=min(2.0, left))
        for ref in done:
            try:
                results[ref] = ray.get(ref)
            except ray.exceptions.RayError as error:
                failures.append(f"{who[ref]}: {cause_of(error)}")
                died = died or not isinstance(error, ray.exceptions.RayTaskError)
        if not done and not failures:  # an actor that nothing is asked of at the moment may have died as well
            states = {name: ray._private.state.actors(actor.hex())["State"] for name, actor in ACTORS.items()}
            failures = [f"{name} has died" for name, state in states.items() if state == "DEAD"]
            died = bool(failures)
        if failures:
            deadline = min(deadline, max(time.monotonic() + 7, start + patience_s))
        elif time.monotonic() > next_sign:
            next_sign += 10
            print(f"... {doing}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if pending:
        silent = f"no answer from {', '.join(map(who.get, pending))} in {time.monotonic() - start:.0f} s"
        if not failures:
            raise TimeoutError(f"{doing}: {silent}; --timeout-s (timeout_s) sets the limit")
        failures.append(silent)
    if failures:
        raise (ConnectionError if died else RuntimeError)(f"{doing}: {'; '.join(failures)}")
    return [results[ref] for ref in refs]


def cause_of(error: Exception) -> str:
    """What an actor raised, or why it died, without the frames that led there."""
    if isinstance(error, ray.exceptions.RayTaskError):
        said = str(error.cause)
        if said in ("cancelled", "Executor failed."):  # vLLM, whatever was under way or is asked then
            said = f"a worker has died, see /tmp/ray/session_latest/logs ({said})"
        return f"{type(error.cause).__name__}: {said}"
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    # If it died while it was made, Ray gives all frames, and the error behind the last one.
    return re.split(r'\n  File ".*\n(?: .*\n)*', text)[-1].strip()


class MyLLM(LLM):
    """vLLM that counts updates of its weights by `WorkerExtension`, and refuses to generate while one is not
    complete (*torn*). At its end it empties the prefix cache, which holds old keys and values."""

    weights_version = 0
    torn: str | None = None  # the worker method that will complete the update which has begun
    asked: tuple[list[str], int] = (PROMPTS, 32)  # what `answer` was last asked: prompts, tokens
    repeatable = True  # asked twice, it says the same twice
    working_memory: set[str] = set()  # names of tensors that change without an update

    # The worker method that begins an update -> the one that completes it. `reset_weights` is vLLM's own.
    UPDATES = {"update_weight": "check_weights_changed"}
    UPDATES |= dict.fromkeys(["receive_weights", "zero_weights", "reset_weights"], "receive_weights")

    def __repr__(self) -> str:
        """LLM's own asks the workers, and Ray would put the answer before every log line."""
        return "MyLLM"

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        """Call a method of every worker; keeps account of updates."""
        self.torn = self.UPDATES.get(method, self.torn)
        results = super().collective_rpc(method, timeout, args, kwargs)
        if method == self.torn:
            if not self.reset_prefix_cache():
                raise RuntimeError("vLLM refused to reset the prefix cache: requests are still running")
            self.weights_version += 1
            self.torn = None
        return results

    def _refuse_if_torn(self) -> None:
        if self.torn:
            update = f"the weight update after version {self.weights_version} has not been completed"
            raise RuntimeError(f"refusing to generate: {update}; sync a complete set of weights first")

    def _add_request(self, *args, **kwargs):
        """Every way to ask an LLM comes through here: generate, chat, enqueue, beam_search, encode, ..."""
        self._refuse_if_torn()
        return super()._add_request(*args, **kwargs)

    def _run_engine(self, *args, **kwargs):
        """... and every way to have it done through here. What an error leaves would block all updates."""
        self._refuse_if_torn()
        try:
            return super()._run_engine(*args, **kwargs)
        except BaseException:
            left = list(self.llm_engine.output_processor.request_states)
            self.llm_engine.abort_request(left, internal=True)
            raise

    def answer(self, prompts: list[str] | None = None, max_tokens: int = 32) -> list[dict]:
        """Greedy answers: `prompt`, `text`, `token_ids`, `logprobs`. Without prompts: to the last ones."""
        self.asked = (prompts, max_tokens) if prompts else self.asked
        self.reset_prefix_cache()  # on GPUs the last bits depend on how much of a prompt was cached
        params = SamplingParams(temperature=0, max_tokens=self.asked[1], logprobs=0, flat_logprobs=True)
        answers = []
        for output in self.generate(self.asked[0], params, use_tqdm=False):
            said = output.outputs[0]
            numbers = {"token_ids": list(said.token_ids), "logprobs": list(said.logprobs.logprobs)}
            answers.append({"prompt": output.prompt, "text": said.text, **numbers})
        return answers

    def observe(self, prompts=None, max_tokens: int = 32, seen: dict | None = None) -> dict:
        """`digests` of what the workers' models reach, by name; `answers`; `repeatable`: asked twice, it says
        the same. With prompts it does ask twice, and looks for what changes without an update."""
        looks, answers = [self.digests()], []
        if seen and looks[0] != seen["digests"]:  # do not ask: wrong weights leave NaN in KV caches for ever
            return {"digests": looks[0]}
        for _ in range(2 if prompts else 1):
            answers.append(self.answer(prompts, max_tokens))
            looks.append(self.digests())
        if prompts:
            self.repeatable, names = answers[0] == answers[1], set().union(*looks)
            self.working_memory = {name for name in names if len({look.get(name) for look in looks}) > 1}
        return {"digests": self.digests(), "answers": answers[-1], "repeatable": self.repeatable}

    def digests(self) -> dict[str, int]:
        """Of all tensors that the workers' models reach, working memory aside."""
        workers = enumerate(self.collective_rpc("reached_digests"))
        named = {f"{name} on worker {i}": digest for i, found in workers for name, digest in found.items()}
        return {name: digest for name, digest in named.items() if name not in self.working_memory}

    def get_weights_version(self) -> int:
        """How many complete updates the weights have had; 0 means as loaded at start-up."""
        return self.weights_version

    def get_workers(self) -> tuple[int, str]:
        """How many workers this engine has, and the type of their device ("cuda", "cpu")."""
        config = self.llm_engine.vllm_config
        return config.parallel_config.world_size, config.device_config.device_type


# ----- 2. Both ends -----------------------------------------------------------------------------------------
class WeightSender:
    """The trainer's end, to inherit from or to hold: rank 0 of the group, and the twin of `WorkerExtension`.

    Of a Hugging Face model weights travel as `save_pretrained` would write them. They may change, move and be
    replaced between syncs. `device` is where the buckets are to be. A sharded trainer has an actor for each
    rank and overrides `weights` to gather them; with FSDP2 (parameters; a buffer is no `DTensor`) by

        return ((name, weight.full_tensor()) for name, weight in super().weights())

    All ranks call `prepare_weights` and `send_weights`, which gather; the one that is in the group sends."""

    def __init__(self, model: torch.nn.Module, device: torch.device | str):
        self.model, self.device = model, torch.device(device)
        self.group: object | None = None
        self.listening: socket.socket | None = None  # from `open_rendezvous` to `init_weight_update_group`
        self.looked: tuple | None = None  # what `check_finite` has found, and by what it still holds
        self.state: dict[str, Tensor] | None = None  # that is prepared, for the next `weights`
        self.prepared: tuple[Manifest, int] | None = None  # what there is, and the bucket size
        self.buckets: Buckets | None = None  # for what is prepared; None until both ends have agreed
        self.views = {}  # of the model's tensors: see `checkpoint_weights`

    def weights(self) -> NamedTensors:
        """Yield (name, full tensor) of every weight, always in the same order. To be overridden."""
        state, self.state = self.state or self.model.state_dict(keep_vars=True), None
        return checkpoint_weights(self.model, state, self.views)

    def open_rendezvous(self, address: str | None) -> tuple[str, int, str]:
        """Listen on `address` (None: this node's own) and a free port; returns both, and "cuda" or "cpu"."""
        address = address or ray.util.get_node_ip_address()
        self.listening = listen(address)
        return address, self.listening.getsockname()[1], self.device.type

    def init_weight_update_group(self, master_address, master_port, world_size, backend=None, timeout_s=60.0):
        """Join as rank 0, beside the workers' method of the same name; by the socket held before, if any."""
        listening, self.listening, self.buckets = self.listening, None, None
        where = master_address, master_port, 0, world_size, self.device
        self.group = stateless_init_process_group(*where, backend, timeout_s, listening)

    @torch.no_grad()
    def check_finite(self) -> tuple[Manifest, dict[str, Tensor]]:
        """Manifest and state of all weights. Raises ValueError if one is NaN, or infinite in BF16: which.

        After `optimizer.step()`, which has to wait anyway, it delays no sync: it looks again only at what has
        been written to since. (Of what is written to `weight.data` torch keeps no count.)"""
        manifest, state, modules, seen = self.looked or ([], {}, [None], None)
        if seen is None or modules[0] is not self.model or seen != signs(state, modules):
            self.looked, manifest, peaks = None, [], {}
            state = self.state = self.model.state_dict(keep_vars=True)
            for name, weight in self.weights():
                manifest.append([name, str(weight.dtype).removeprefix("torch."), list(weight.shape)])
                if weight.is_floating_point():
                    peaks[name] = torch.linalg.vector_norm(weight, math.inf).to(self.device, torch.bfloat16)
            finite = torch.stack(list(peaks.values())).isfinite().tolist()
            if wrong := [name for name, is_finite in zip(peaks, finite) if not is_finite]:
                what = f"{len(wrong)} weights hold NaN or infinity and were not sent: {some(wrong)}"
                raise ValueError(f"{what}. Go on from an earlier checkpoint with a lower learning rate")
            modules = [*self.model.modules()]
            self.looked = manifest, state, modules, signs(state, modules)
        return manifest, state

    def prepare_weights(self, bucket_bytes: int = BUCKET_BYTES) -> Manifest | None:
        """Check all weights, before a byte moves. Returns their manifest; None if it is the one agreed on."""
        manifest, self.state = self.check_finite()
        self.looked = None  # it holds what may be replaced
        if self.buckets is not None and self.prepared == (manifest, bucket_bytes):
            return None
        self.prepared, self.buckets = (manifest, bucket_bytes), None
        return manifest

    def agree_on_weights(self, manifest: Manifest, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Get ready to send what `prepare_weights` has listed, in the dtypes of `manifest`."""
        self.buckets = None  # its memory is free before new buckets take theirs
        self.buckets = Buckets(manifest, bucket_bytes, self.group, self.device)

    @torch.no_grad()
    def send_weights(self, others: bool = False) -> tuple[int, float] | None:
        """Broadcast all buckets and their digests, beside the workers' `receive_weights`. Returns bytes and
        seconds; None on a rank that is not in the group."""
        start = time.perf_counter()
        with to_the_end(self.weights()) as weights:  # all ranks of a sharded trainer gather all weights
            if self.group is None:
                return None
            if self.buckets is None:
                raise RuntimeError(NOT_AGREED)
            self.buckets.send(weights, others)
        return self.buckets.nbytes, time.perf_counter() - start


def signs(state: dict[str, Tensor], modules: list[torch.nn.Module]) -> list | None:
    """Others as soon as a tensor is written to, or anything replaced. None: that cannot be known."""
    places = (place for m in modules for place in (m._parameters, m._buffers, m._modules))
    held = [*map(id, itertools.chain.from_iterable(map(dict.values, places)))]
    plain = {*map(type, state.values())} <= {Tensor, torch.nn.Parameter}  # DTensors do not tell
    if not plain or not {*map(id, state.values())} <= {*held}:  # nor do copies, which some models' hooks make
        return None
    return held + [(tensor._version, tensor.data_ptr()) for tensor in state.values()]


def checkpoint_weights(model, state: dict[str, Tensor], known: dict | None = None) -> NamedTensors:
    """Names and tensors of what `save_pretrained` would write, for which vLLM's loaders are made; a tied one
    once. In `state`, the model's, names may be others, and experts fused: most are views, as `known` says."""
    ignored, first = getattr(model, "_keys_to_ignore_on_save", None) or (), {}
    for name, tensor in state.items():
        if name not in ignored and tensor.numel():
            first.setdefault(id(tensor), (name, tensor))
    weights = dict(first.values())
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
    """Where in a layer's tensors lies what `save_pretrained` makes of them, by name: a tensor's name, size,
    stride and offset to it. None if something is computed."""
    if any(map(is_traceable_wrapper_subclass, layer.values())):  # DTensors have no strides of their own
        return None
    with Instead(Tensor.contiguous, lambda tensor, **_: tensor):  # parts of a tensor stay parts of it
        saved = revert_weight_conversion(model, layer)
    sources, views = {storage(tensor): name for name, tensor in layer.items()}, {}
    for name, tensor in saved.items():
        source = sources.get(storage(tensor))
        if source is None or tensor.dtype != layer[source].dtype:
            return None
        offset = tensor.storage_offset() - layer[source].storage_offset()
        views[name] = (source, tensor.shape, tensor.stride(), offset)
    return views


@contextlib.contextmanager
def computing_as(model, names: dict[str, list], tp: int, torchao_config, noise=0.0) -> Iterator[None]:
    """In the block a Hugging Face model computes linear layers as an engine with these `names` (of
    `inspect_weights`) does, by torchao, by rows, or else by fp8_per_channel: it rounds weights, and inputs
    where the scheme does, a layer at a time. Embeddings get random `noise`, relative to them."""
    linear, experts = torch.nn.functional.linear, model.config._experts_implementation
    shards = {}  # by weight: parts of its inputs
    for name, weight in model.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        known = "experts" if ".experts." in name else last
        if known in names["fp8"] and known not in names["not_fp8"]:
            shards[storage(weight)] = tp if last in names["split"] else 1
    random = torch.Generator(model.device)

    def disturb(_, __, hidden: Tensor) -> Tensor:
        drawn = torch.randn(hidden.shape, generator=random, device=hidden.device)
        return (hidden * (1 + noise * drawn)).to(hidden.dtype)

    def round_rows(matrix: Tensor) -> Tensor:
        scale = matrix.float().abs().amax(1, keepdim=True).div(448).clamp(min=1 / (448 * 512))
        return (matrix / scale).to(torch.float8_e4m3fn).float() * scale

    def compute(plain, given, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if (count := shards.get(storage(weight))) is None:
            return plain(*given)
        weight, parts = weight if plain is linear else weight.T, x.bfloat16().flatten(0, -2).chunk(count, 1)
        with torch.autocast(x.device.type, enabled=False):
            if torchao_config:
                shard = [torch.nn.Parameter(part.contiguous()) for part in weight.bfloat16().chunk(count, 1)]
                shard = [vllm_torchao.torchao_quantize_param_data(part, torchao_config) for part in shard]
                products = [linear(x, repair_zero_rows(w)) for x, w in zip(parts, shard, strict=True)]
            else:
                shard = round_rows(weight.bfloat16()).chunk(count, 1)  # their scale is that of the whole row
                products = [linear(round_rows(x), w).bfloat16() for x, w in zip(parts, shard, strict=True)]
            output = sum(products) + (0 if bias is None else bias.bfloat16())
        return output.view(*x.shape[:-1], -1).to(x.dtype)

    model.set_experts_implementation("eager")  # expert by expert, each a linear layer
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.compiler.set_stance("force_eager"))
        modes.callback(model.set_experts_implementation, experts)
        modes.callback(model.get_input_embeddings().register_forward_hook(disturb).remove)
        modes.enter_context(Instead(linear, lambda *given: compute(linear, given, *given)))
        modes.enter_context(Instead(torch.addmm, lambda b, x, w: compute(torch.addmm, (b, x, w), x, w, b)))
        modes.enter_context(Instead(Tensor.matmul, lambda x, w: compute(Tensor.matmul, (x, w), x, w)))
        yield


class Instead(TorchFunctionMode):
    """While active, torch calls another function instead of one of its own."""

    def __init__(self, plain, other):
        super().__init__()
        self.plain, self.other = plain, other

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (self.other if function is self.plain else function)(*args, **kwargs or {})


def storage(tensor: Tensor) -> int:
    """What views of one tensor have in common."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def to_the_end(items: Iterator) -> Iterator[Iterator]:
    """Take what the block leaves of `items`, whatever happens in it: other ranks count on this one."""
    try:
        yield items
    except BaseException:
        with contextlib.suppress(Exception):  # the first error counts
            deque(items, maxlen=0)
        raise
    deque(items, maxlen=0)


def collective(method):
    """Decorator for worker methods: all workers run it, all learn of any error, and the last one raises it:
    vLLM's executor reads replies in rank order up to an error; one behind it would answer the next call."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        group, error, result = get_world_group(), None, None
        try:  # as it is while vLLM loads a model: some loaders make tensors, some models build others
            with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(self.model_config.dtype):
                result = method(self, *args, **kwargs)
        except Exception as caught:  # raised below, for all workers at once
            logger.exception("%s failed", method.__name__)
            error = f"{type(caught).__name__}: {caught}"
        errors = [error] * group.world_size
        if group.world_size > 1:  # rank 0 names who does not come; after an error the others are near
            limit_s = getattr(getattr(self, "weight_group", None), "timeout_s", 600)
            limit_s = max(2, min(5, limit_s / 3)) if error else limit_s  # `wait` has 7 s
            try:
                dist.monitored_barrier(group.cpu_group, timedelta(seconds=limit_s), wait_all_ranks=True)
            except RuntimeError as missing:
                found = f"engine rank {group.rank_in_group}: {error or 'done'}; {missing}"
                raise RuntimeError(f"{method.__name__} failed. {found}") from missing
            dist.all_gather_object(errors, error, group=group.cpu_group)
        if any(errors) and isinstance(self, OnlineQuantTransfer) and self.worker._weight_update_active:
            self.torn, self.worker._weight_update_active, self.last = True, False, None  # vLLM's; agree anew
        if any(errors) and group.rank_in_group == group.world_size - 1:
            failed = "; ".join(f"engine rank {rank}: {e}" for rank, e in enumerate(errors) if e)
            raise RuntimeError(f"{method.__name__} failed. {failed}")
        return result

    return call


class WorkerExtension:
    """The engine's end: `worker_extension_cls="rlhf_utils.WorkerExtension"` adds it to vLLM's workers.

    Called by name, `llm.collective_rpc("method", args=(...))`. New weights come by `agree_on_weights`, once,
    and `receive_weights`; or, all of them one by one, by `update_weight`, then `check_weights_changed`."""

    weight_group = None
    manifest: Manifest | None = None  # of the last complete set of weights: names and shapes stay
    buckets: Buckets | None = None  # None until both ends have agreed
    replay: Replay | None = None  # None: updates are sessions
    no_replay: str | None = None  # why there will be none, whatever both ends agree on
    session: ReloadSession | None = None  # that `update_weight` has opened, until an update was complete
    last_seen: dict[str, int] | None = None  # what was stored when `check_weights_changed` was last asked
    at_start: Reached | None = None  # what the model reached before anything was brought
    after_loading: dict[str, int] | None = None  # digests, if requests may come before `zero_weights`
    newest: WorkerExtension | None = None  # of this process

    def __new__(cls, *args, **kwargs):
        """The first thing that happens in a worker, before there is a model."""
        patch_libraries()
        WorkerExtension.newest = super().__new__(cls)
        return WorkerExtension.newest

    @collective
    def init_weight_update_group(
        self, master_address, master_port, rank_offset, world_size, backend=None, timeout_s=60.0
    ) -> None:
        """Join the trainer's group as rank `rank_offset` + this worker's rank."""
        self.buckets = self.replay = self.weight_group = None
        self.last_seen = self.last_seen or self._reached().digests(stored=True)
        where = master_address, master_port, rank_offset + self.rank, world_size, self.device
        self.weight_group = stateless_init_process_group(*where, backend, timeout_s)

    def _reached(self) -> Reached:
        """What the model reaches now, without KV caches, which are large and never from weights."""
        return Reached(self.get_model(), self.model_runner.kv_caches)

    def _open_session(self) -> ReloadSession:
        """A new session; one that `update_weight` has left open ends."""
        self._drop_session()
        self.at_start = self.at_start or self._reached()
        return ReloadSession(self.get_model(), self.model_config, self.at_start, self._reached)

    def _drop_session(self) -> None:
        if self.session is not None:
            with contextlib.suppress(Exception):  # of one that has failed; what it has left comes anew
                self.session.close()
        self.session = None

    @collective
    def agree_on_weights(self, manifest: Manifest, bucket_bytes=BUCKET_BYTES) -> tuple[Manifest, str | None]:
        """Get ready to receive these weights. Returns them in the dtypes in which they are to travel, and why
        by sessions (None: by replays). Raises ValueError if they differ from the last complete set."""
        if self.manifest is not None:
            check_manifest(manifest, self.manifest)
        self.buckets = self.replay = None  # frees their memory for the new buckets
        because, copies = self.no_replay, {}
        try:
            copies = {} if because else record_copies(self._open_session(), manifest)
        except CannotReplay as reason:
            because = str(reason)
        wire = wire_manifest(manifest, copies)
        self.buckets = Buckets(wire, bucket_bytes, self.weight_group, self.device)
        try:
            self.replay = None if because else Replay(self.get_model(), copies, self.buckets)
        except CannotReplay as reason:
            because = str(reason)
        return wire, because

    @collective
    def give_up_replays(self, because: str) -> None:
        """Updates are sessions from now on."""
        self.no_replay, self.replay = because, None

    @collective
    def receive_weights(self, by_session: bool = False) -> str:
        """Receive a complete set of weights as agreed on; blocks. Returns the path, "replay" or "session"."""
        if self.buckets is None:
            raise RuntimeError(NOT_AGREED)
        by_session = by_session or self.replay is None
        with to_the_end(self.buckets.receive()) as numbers:
            self._take_in(numbers, by_session)
        self.manifest = self.buckets.manifest
        return "session" if by_session else "replay"

    def _take_in(self, numbers: Iterator[int], by_session: bool) -> None:
        """Bring what comes in buckets to where it is computed with."""
        if by_session:
            with contextlib.closing(self._open_session()) as session:
                session.load(self.buckets.weights(numbers))
                session.complete()
        else:
            for number in numbers:
                if number == 0:  # while the second bucket travels
                    self._drop_session()
                    self.at_start.put_back()  # what others may have moved or made anew
                self.replay(number)

    @collective
    def update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Receive one weight that rank 0 broadcasts now. The first call opens the update."""
        one = Buckets([[name, dtype_name, shape]], 0, self.weight_group, self.device, as_vllm=True)
        with to_the_end(one.receive_from_vllm()) as weights:
            if self.session is None or not self.session.is_open:
                self.session = self._open_session()
            self.session.load(weights)

    @collective
    def check_weights_changed(self) -> bool:
        """End the update that `update_weight` began, if any; has a stored byte changed since the last call
        (or since this worker joined a group)? Raises ValueError if the update was not complete."""
        if self.session is not None:
            if not self.session.is_open:
                raise ValueError("an `update_weight` has failed: send all weights again")
            self.session.complete()
            self.session = None
        before, self.last_seen = self.last_seen, self._reached().digests(stored=True)
        return self.last_seen != before

    @collective
    def reached_digests(self) -> dict[str, int]:
        """Of every tensor that this worker's model reaches, by name."""
        return self._reached().digests()

    @collective
    def zero_weights(self, which: str = "all") -> None:
        """Set to zero what loading has written, so that what the next sync forgets will show: "stored", which
        are parameters and buffers; or "all", also what hangs elsewhere, and which no replay makes again."""
        reached, before = self._reached(), self.get_model().digests_before_loading
        after = self.after_loading or reached.digests()
        for name, tensor in reached.tensors.items():
            written = name in reached.parameters or after.get(name) != before.get(name)
            if written and (name in reached.stored or which == "all" and tensor.is_floating_point()):
                tensor.zero_()

    @collective
    def inspect_weights(self) -> dict:
        """GiB of this shard: `weights_gib`, of them `fp8_gib`; `bf16_weights_gib`, if all were
        BF16. `fp8_linear_layers` counts tensors, `not_fp8` names and shapes of weights by kind of layer.
        `names`: the last part of names in a checkpoint, of what is in FP8, is not, has inputs split by TP."""
        model, layers, not_fp8, names = self.get_model(), 0, {}, {"fp8": [], "not_fp8": [], "split": []}
        fused = getattr(model, "packed_modules_mapping", {})
        gib = dict.fromkeys(("weights_gib", "fp8_gib", "bf16_weights_gib"), 0.0)
        for name, weight in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            is_scale, parts = "weight_scale" in leaf, [weight]
            if is_traceable_wrapper_subclass(weight):  # torchao's
                parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
            loaded = layerwise.get_layerwise_info(layer).restore_metadata[0].get(leaf, weight)
            size = sum(part.nbytes for part in parts) / 2**30
            last = path.removesuffix(".routed_experts").rpartition(".")[2]
            called = fused.get(last, [last])
            gib["weights_gib"] += size
            if not is_scale:
                gib["bf16_weights_gib"] += 2 * loaded.numel() / 2**30
            if any(part.dtype == torch.float8_e4m3fn for part in parts):
                gib["fp8_gib"] += size
                layers += 1 if leaf == "weight" else 0  # experts have others
                names["fp8"] += called
                if leaf == "w2_weight" or isinstance(layer, RowParallelLinear):
                    names["split"].append("down_proj" if leaf == "w2_weight" else last)
            elif not is_scale and loaded.ndim > 1 and "bias" not in leaf:
                names["not_fp8"] += called
                not_fp8.setdefault(type(layer).__name__, []).append(f"{name} {list(loaded.shape)}")
        names = {kind: sorted(set(each)) for kind, each in names.items()}
        return {"rank": self.rank, "fp8_linear_layers": layers, "not_fp8": not_fp8, "names": names, **gib}


def check_manifest(manifest: Manifest, expected: Manifest) -> None:
    """Raise one ValueError that lists every missing, unexpected, duplicate or misshapen weight."""
    found, known = ({name: list(shape) for name, _, shape in each} for each in (manifest, expected))
    counts = Counter(name for name, _, _ in manifest)
    problems = [f"duplicate: {name}" for name, count in counts.items() if count > 1]
    for name in [name for name in found | known if found.get(name) != known.get(name)]:
        kind = "unexpected" if name not in known else "missing" if name not in found else "misshapen"
        problems.append(f"{kind}: {name} is {found.get(name)}, the engine's model has {known.get(name)}")
    if problems:
        what = f"{len(problems)} weights do not fit the engine's model; send one of the same architecture and"
        raise ValueError("\n  ".join([f"{what} shapes as the engine was started with:", *problems]))


# ----- 3. The session, and all that a model reaches ---------------------------------------------------------
class ReloadSession:
    """vLLM's own way to load a whole new set of weights into a running model: open, `load` each once, close.

    Then all is where it was `at_start`, also what vLLM makes anew, such as kernels with tables of scales.
    Close one that failed, too: the model holds no valid weights then, but can be reloaded."""

    def __init__(self, model: torch.nn.Module, model_config, at_start: Reached, look):
        self.model, self.model_config, self.at_start, self.look = model, model_config, at_start, look
        self.parameters = [name for name, _ in model.named_parameters()]  # a tied one by its first name
        self.came, self.loaded, self.is_open = set(), set(), True
        layerwise.initialize_layerwise_reload(model)

    def load(self, weights: NamedTensors) -> None:
        """Give checkpoint tensors (full shapes, any dtype) to vLLM's loaders; an error names the weight."""
        at = "the first weight"

        def watched() -> NamedTensors:
            nonlocal at
            for name, weight in weights:
                at = f"{name} {list(weight.shape)}"
                if name in self.came:
                    raise ValueError("it came twice in one update")
                self.came.add(name)
                yield name, weight

        try:
            self.loaded |= self.model.load_weights(watched()) or set()
        except Exception as error:
            with contextlib.suppress(Exception):  # that what was begun cannot be finished follows from it
                self.close()
            if isinstance(error, (ConnectionError, TimeoutError)):  # the wire, not the loader
                raise
            raise RuntimeError(f"vLLM's loader failed at {at}: {type(error).__name__}: {error}") from error

    def complete(self) -> None:
        """Close; raises ValueError if parameters got no weight, or not all of their parts, as vLLM counts."""
        found, came = [], {tuple(name.split(".")[-5:]) for name in self.came}  # prefixes may differ
        packed = getattr(self.model, "packed_modules_mapping", {})
        for name in self.parameters:
            path, _, leaf = name.rpartition(".")
            layer = self.model.get_submodule(path)
            info = layerwise.get_layerwise_info(layer)
            if leaf not in layer._parameters or not info.can_load():  # vLLM makes it; its layer is complete
                continue
            calls = [call.arguments.values() for tensor, call in info.loaded_weights if tensor == leaf]
            # A part has its name or number; what comes whole may fill less than all, the rest is padding.
            in_parts = any(type(value) in (str, int, tuple) for arguments in calls for value in arguments)
            path, _, fused = path.rpartition(".")
            parts = [f"{path}.{part}.{leaf}" for part in packed.get(fused, [])]
            lacks = [part for part in parts if tuple(part.split(".")[-5:]) not in came]
            if not calls and name not in self.loaded:
                found.append(name)
            elif in_parts and info.load_numel < info.load_numel_total and (lacks or not parts):
                found.append(f"{name} (without {some(lacks) or 'all of its parts'})")
        self.close()
        if found:
            raise ValueError(f"{len(found)} parameters got no weight and are stale: {some(found)}")

    def close(self, with_values: bool = True) -> None:
        """Once: let vLLM finish what it has; then everything takes its place again."""
        if not self.is_open:
            return
        self.is_open, now = False, None
        layerwise.logger.setLevel(logging.ERROR)  # it warns of layers without weights, such as tied heads
        try:
            layerwise.finalize_layerwise_reload(self.model, self.model_config)
            now = self.look() if with_values else None
        finally:
            for layer in self.model.modules():
                layerwise.get_layerwise_info(layer).reset()
            self.at_start.put_back(now)


class Reached:
    """All tensors that a model reaches, by name, and the places by which it does.

    A module reaches its parameters and buffers and, by its other attributes, objects (quant methods, kernels,
    their configs, closures, lists) that have tensors of their own: scales, strides, copies in another form.
    Left out are objects of FOREIGN packages, and the tensors `without`."""

    FOREIGN = ("torch.", "transformers.", "vllm.config", "vllm.compilation", "vllm.distributed")

    def __init__(self, model: torch.nn.Module, without: object = ()):
        self.tensors: dict[str, Tensor] = {}  # others, which keep the memory
        self.places: list[tuple] = []  # holder, key, a tensor or what leads to one, the tensor's memory
        self._without = {storage(tensor) for tensor in tree_leaves(without)}
        self._memory: dict[int, Tensor] = {}  # by the id of a tensor
        modules = list(model.named_modules())
        self._seen = {id(module): (module, False) for _, module in modules}  # and: does it lead to a tensor?
        names = []  # of parameters; and of buffers; and of all
        for content in ("_parameters", "_buffers", "__dict__"):
            for name, module in modules:
                self._visit(name, getattr(module, content))
            names.append(set(self.tensors))
        self.parameters, self.stored, _ = names
        del self._seen

    def _visit(self, name: str, value: object) -> bool:
        """Note what is behind a value; does it lead to a tensor?"""
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = value, False  # until it is known; and nothing else gets this id
        leads = isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)  # torchao's: its parts
        if leads:
            if value.is_meta or isinstance(value, FakeTensor) or storage(value) in self._without:
                return False
            self.tensors[name] = self._memory[id(value)] = value.data
        holder = inside(value)
        for key, held in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if self._visit(f"{name}.{key}".lstrip("."), held):
                self.places.append((holder, key, held, self._memory.get(id(held))))
                leads = True
        self._seen[id(value)] = value, leads
        return leads

    def digests(self, stored: bool = False) -> dict[str, int]:
        """A 64-bit digest of every tensor, or of parameters and buffers alone, by name."""
        names = [name for name in self.tensors if name in self.stored or not stored]
        found = [digest(self.tensors[name]) for name in names]
        return dict(zip(names, torch.stack([one.to(found[0].device) for one in found]).tolist()))

    @torch.no_grad()
    def put_back(self, now: Reached | None = None) -> None:
        """All takes its place again, with the values that there are `now` or, if that is None, with its own.
        Raises RuntimeError if something is missing now, or has another form."""
        lost = []
        for name, memory in self.tensors.items() if now else ():
            new = now.tensors.get(name)
            if new is None or (new.shape, new.dtype) != (memory.shape, memory.dtype):
                lost.append(name)
            elif new.data_ptr() != memory.data_ptr():
                memory.copy_(new)
        for holder, key, value, memory in self.places:
            holder[key] = value
            if memory is not None and value.data_ptr() != memory.data_ptr():
                value.data = memory
        if lost:
            raise RuntimeError(f"a reload leaves no {some(lost)}, or in another form than at the start")


def inside(value: object) -> dict | list:
    """What an object holds, in the very dictionary or list that it has for it, if it has one."""
    if isinstance(value, (dict, list, tuple)):
        return list(value) if isinstance(value, tuple) else value
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    foreign = type(value).__module__.startswith(Reached.FOREIGN) and not isinstance(value, Tensor)
    is_code = isinstance(value, (type, types.ModuleType))
    return {} if foreign or is_code or not hasattr(value, "__dict__") else vars(value)


# ----- 4. The group: rank 0 is the trainer, ranks 1..TP are the engine's workers ----------------------------
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
        data = tensor.detach().view(-1).view(torch.uint8)
        host = data.cpu()  # `data` itself if that is on the CPU
        self.gloo.broadcast(host, src).wait()
        data.copy_(host)


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening socket on an IPv4 or IPv6 address or host name; port 0 takes a free one."""
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address, port), family=family)


def stateless_init_process_group(
    master_address, master_port, rank, world_size, device, backend=None, timeout_s=60.0, listen_socket=None
):
    """Join the weight-update group and return an object with `broadcast(tensor, src, stream=None)`.

    It leaves torch.distributed's default group alone. Every rank must call it; rank 0 serves the rendezvous,
    on `master_address` (IPv4, IPv6, name) alone, by `listen_socket` if it has one. Nothing is unpickled.

    `device` is where this rank's tensors live. `backend` is "nccl" or, if any rank is on a CPU, "gloo"; by
    default as `device` is. `timeout_s` is for the other ranks to come, and (in `Buckets`) for each broadcast.
    Raises TimeoutError (which ranks did not come), OSError (the port is taken), RuntimeError (no NCCL)."""
    device, timeout = torch.device(device), timedelta(seconds=timeout_s)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # NCCL wants to know which
    where, options = f"{master_address}:{master_port}", {"wait_for_workers": False, "use_libuv": False}
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
    if rank == 0:
        store.set("nccl_id", bytes(NCCLLibrary().ncclGetUniqueId().internal))
    with unpinned_nccl_env(), set_default_torch_dtype(torch.float32):  # not as vLLM's workers have them
        group = PyNcclCommunicator.from_unique_id_bytes(store.get("nccl_id"), rank, world_size, device)
    if group.disabled:
        raise RuntimeError(f"rank {rank}: NCCL is disabled in vLLM (is VLLM_DISABLE_PYNCCL set?)")
    group.store, group.timeout_s = store, timeout_s  # the other ranks may still be reading the store
    return group


# ----- 5. The buckets: both ends make the same plan from the same manifest ----------------------------------
def plan_buckets(manifest: Manifest, bucket_bytes: int, as_vllm=False) -> list[tuple[int, list[tuple]]]:
    """Split a manifest into (bytes, [(name, offset, bytes, dtype, shape), ...]). What is larger than a bucket
    gets one for itself. vLLM packs without gaps, until a bucket is larger than that.

    >>> plan = plan_buckets([["a", "bfloat16", [3]], ["b", "bfloat16", [3, 16]], ["c", "bfloat16", [9]]], 128)
    >>> [[(name, offset) for name, offset, *_ in pieces] for _, pieces in plan]
    [[('a', 0), ('b', 16)], [('c', 0)]]
    """
    buckets: list[tuple[int, list[tuple]]] = []
    for name, dtype_name, shape in manifest:
        dtype, unit = getattr(torch, dtype_name), 1 if as_vllm else 16
        nbytes = math.prod(shape) * dtype.itemsize
        if not buckets or buckets[-1][0] + (0 if as_vllm else nbytes) > bucket_bytes:
            buckets.append((0, []))
        size, pieces = buckets.pop()
        pieces.append((name, size, nbytes, dtype, shape))
        buckets.append((-(-(size + nbytes) // unit) * unit, pieces))
    return buckets


class Buckets:
    """Fixed memory for weights on their way: two buckets in turn; one travels while the other is worked on.

    Both ends work on buckets in the current stream and broadcast in one of their own (on the CPU both are
    nothing); the host waits for nothing until the end."""

    def __init__(self, manifest: Manifest, bucket_bytes: int, group, device: torch.device, as_vllm=False):
        self.manifest, self.group = manifest, group
        plan = plan_buckets(manifest, bucket_bytes, as_vllm)
        sizes = [max(size for size, _ in plan[i::2]) for i in range(len(plan[:2]))]
        two = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        self.buckets: list[tuple[Tensor, list[tuple[str, Tensor]]]] = []  # bytes; names, and views of them
        self.names = []  # for messages
        for number, (size, pieces) in enumerate(plan):
            memory = two[number % 2][:size]
            cut = ((name, memory[at : at + n], dtype, shape) for name, at, n, dtype, shape in pieces)
            views = [(name, part.view(dtype).view(shape)) for name, part, dtype, shape in cut]
            self.buckets.append((memory, views))
            self.names.append(f"bucket {number + 1} of {len(plan)} ({pieces[0][0]} .. {pieces[-1][0]})")
        self.names.append("the digests")
        self.nbytes = sum(view.nbytes for _, views in self.buckets for _, view in views)
        self.digests = torch.zeros(len(plan), dtype=torch.int64, device=device)
        self.streams = torch.get_device_module(device)
        self.wire = self.streams.Stream(priority=-1)
        self.events = []  # of the broadcasts of a sync: every bucket's, then that of the digests

    def start(self, tensor: Tensor) -> None:
        """Broadcast the next bucket, or at last the digests, after all that the current stream has to do."""
        if self.group is None:
            raise RuntimeError("this rank has joined no group: call join_group first")
        at, event = f"rank {self.group.rank}, {self.names[len(self.events)]}", self.streams.Event()
        if getattr(self.group, "disabled", False):  # vLLM's communicator would do nothing, silently
            raise ConnectionError(f"{at}: this group was given up after an error; join a new one")
        self.events.append(event)
        self.wire.wait_stream(self.streams.current_stream())
        try:
            with self.streams.stream(self.wire):
                self.group.broadcast(tensor, src=0, stream=self.wire)
                event.record()
        except RuntimeError as error:  # gloo's, which waits here
            raise ConnectionError(f"{at}: {error}") from error

    def finish(self, number: int) -> None:
        """Until a broadcast has ended; aborts and raises TimeoutError, where NCCL would wait for ever."""
        deadline = time.monotonic() + self.group.timeout_s
        while not self.events[number].query():
            if time.monotonic() > deadline:
                self.group.destroy()  # NCCL's kernels would keep the GPU busy for ever
                at = f"rank {self.group.rank}, {self.names[number]}"
                raise TimeoutError(f"{at}: no progress for {self.group.timeout_s:g} s")
            time.sleep(1e-4)

    def fill(self, weights: NamedTensors, others: bool = False) -> Iterator[int]:
        """Fill each bucket, cast to its dtypes; yield its number.

        Others are made in the buckets, w + roll(w, 1) / 16 + 2^-10 of each piece w of floating-point numbers:
        bytes and scales of all FP8 rows change, zeros too, and a model stays sane."""
        self.events = []
        for number, (_, views) in enumerate(self.buckets):
            sources = []
            for name, view in views:
                came, weight = next(weights, ("no more weights", torch.empty(0)))
                found, expected = (came, list(weight.shape)), (name, list(view.shape))
                if found != expected:
                    raise ValueError(f"found {found}, expected {expected}, which `prepare_weights` has seen")
                sources.append(weight)
            torch._foreach_copy_([view for _, view in views], sources)
            for _, view in views if others else ():
                if view.is_floating_point():
                    view.add_(view.roll(1).div_(16).add_(2**-10))
            yield number

    def send(self, weights: NamedTensors, others: bool = False) -> None:
        """Rank 0: fill and broadcast each bucket; digests come last."""
        for number in self.fill(weights, others):
            self.start(self.buckets[number][0])
            # Before the next is packed, so that it does not take the GPU just when that broadcast starts.
            self.digests[number] = digest(self.buckets[number][0])
            if number > 0:
                self.events[number - 1].wait()  # it has the same memory as the next
        self.start(self.digests)
        for number in range(len(self.events)):
            self.finish(number)

    def receive(self) -> Iterator[int]:
        """Ranks 1..TP: yield the number of each bucket that has come in; to the end, even after an error.
        Raises ConnectionError if a bucket is not what was sent, with its first and last weight."""
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
            names = ", ".join(self.names[number] for number in wrong)
            raise ConnectionError(f"{count} came in with other bytes than were sent: {names}")

    def weights(self, numbers: Iterator[int]) -> NamedTensors:
        """(name, tensor in memory of its own) of each weight in buckets of these numbers."""
        for number in numbers:
            if self.events:
                self.finish(number)  # vLLM's loaders make the host wait in any case
            for name, view in self.buckets[number][1]:
                yield name, view.clone()

    def receive_from_vllm(self) -> NamedTensors:
        """(name, tensor) of what vLLM's own sender broadcasts; to be used before the next bucket but one."""
        for number, (memory, views) in enumerate(self.buckets):
            self.start(memory)
            self.finish(number)
            yield from views


# ----- 6. The replay: what a session would copy, done again without vLLM's loaders --------------------------
class CannotReplay(Exception):
    """Why vLLM's loading of this model cannot be written down as copies. Sessions are used instead."""


class Copy(NamedTuple):
    """From a view of a received weight to one of an engine's tensor, of the same sizes."""

    source: Tensor  # on meta
    target: Tensor
    tensor: str
    loaded: Tensor  # what `target` is a view of: the tensor as vLLM's loaders see it, unquantized


def record_copies(session: ReloadSession, manifest: Manifest) -> dict[str, list[Copy]]:
    """What a session would copy of each weight, learned in this one from weights without memory. It ends, and
    the model is as it was. Raises CannotReplay, with the reason, if the loaders do more than copy."""
    weights = {}
    for name, dtype, shape in manifest:
        weights[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    tensors, recorded, live = named_tensors(session.model), [], []
    try:
        live += [(tensor, tensor.clone()) for tensor in tensors.values() if not tensor.is_meta]  # biases are
        with Instead(Tensor.copy_, lambda target, source, *_: recorded.append((target, source)) or target):
            session.model.load_weights(iter(weights.items()))
        tensors |= named_tensors(session.model)  # loaders may register more
    except Exception as error:  # of any kind: they are vLLM's loaders for hundreds of models
        raise CannotReplay(f"vLLM's loaders want to see weights: {type(error).__name__}: {error}") from error
    finally:
        for layer in session.model.modules():
            layerwise.get_layerwise_info(layer).load_numel = 0  # as if nothing had come
        session.close(with_values=False)
        for tensor, values in live:
            tensor.data.copy_(values)

    weight_at = {storage(weight): name for name, weight in weights.items()}
    tensor_at = {storage(tensor): name for name, tensor in tensors.items()}
    copies: dict[str, list[Copy]] = {}
    for target, source in recorded:
        weight, tensor = weight_at.get(storage(source)), tensor_at.get(storage(target))
        if weight and tensor:
            copy = Copy(source.expand(target.shape), target, tensor, tensors[tensor])
            copies.setdefault(weight, []).append(copy)
        elif weight or tensor:
            what = f"from {weight or 'what they have computed'} into {tensor or 'what is not the model'}"
            raise CannotReplay(f"vLLM's loaders do more than copy weights: they copy {what}")
    return copies


def named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones by each of their names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return dict(model.named_parameters(remove_duplicate=False)) | buffers


def wire_manifest(manifest: Manifest, copies: dict[str, list[Copy]]) -> Manifest:
    """Each weight in the one dtype that it is copied into (the model's, if only on other workers), if that is
    no wider; else as it is."""
    result = []
    for name, own, shape in manifest if copies else ():
        dtypes = {copy.target.dtype for copy in copies.get(name, [])} or {torch.get_default_dtype()}
        dtype, source = dtypes.pop(), getattr(torch, own)
        fits = not dtypes and source.is_floating_point and dtype.itemsize <= source.itemsize
        result.append([name, str(dtype).removeprefix("torch.") if fits else own, shape])
    return result or manifest


class Replay:
    """A session's copies without vLLM's loaders: rows are quantized straight into the live tensors. Raises
    CannotReplay if a tensor is stored in another form than rows in FP8, or than it was loaded in."""

    def __init__(self, model: torch.nn.Module, copies: dict[str, list[Copy]], buckets: Buckets):
        live = named_tensors(model)
        self.on_gpu = buckets.digests.is_cuda
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by bucket
        self.capturing = buckets.streams.Stream()
        self.steps = []  # for each bucket: what to quantize, and arguments of _foreach_copy_
        for _, views in buckets.buckets:
            rows, plain = {}, []
            for name, view in views:
                for copy in copies.get(name, []):
                    bind(copy, name, view, live, rows, plain)
            self.steps.append(([Rows(*item) for item in rows.items()], tuple(zip(*plain))))

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
        for rows in to_quantize:
            rows.quantize()
        if to_copy:
            torch._foreach_copy_(*to_copy)


def bind(copy: Copy, name: str, view: Tensor, live: dict[str, Tensor], rows: dict, plain: list) -> None:
    """Add what a replay does with a weight's copy, as views of bucket and live tensor: to `rows`, by kind
    (see `Rows`), or (target, source) to `plain`. Raises CannotReplay, with the reason."""
    target, offset = copy.target, view.storage_offset() + copy.source.storage_offset()
    source = view.as_strided(copy.source.shape, copy.source.stride(), offset)
    stored, scale, loaded = live.get(copy.tensor), live.get(f"{copy.tensor}_scale"), copy.loaded
    if stored is None:
        raise CannotReplay(f"vLLM has no {copy.tensor} any more")
    by_vllm = not isinstance(stored, Float8Tensor)
    qdata, scale = (stored, scale) if by_vllm else (stored.qdata, stored.scale)
    if by_vllm and (stored.shape, stored.dtype) == (loaded.shape, loaded.dtype) and stored.is_contiguous():
        at = stored.storage_offset() + target.storage_offset()
        plain.append((stored.data.as_strided(target.shape, target.stride(), at), source))
        return
    qdata = qdata if qdata.is_contiguous() else qdata.mT  # as vLLM stores linear layers
    by_rows = scale is not None and (qdata.shape, scale.shape) == (loaded.shape, (*loaded.shape[:-1], 1))
    if not by_rows or qdata.dtype != torch.float8_e4m3fn or not qdata.is_contiguous():
        why = "neither as it loads it nor in FP8 by rows (the CPU packs experts, other schemes have blocks)"
        raise CannotReplay(f"vLLM stores {copy.tensor} {why}")
    columns, whole = loaded.shape[-1], source
    first, beside = divmod(target.storage_offset(), columns)
    taken_by_rows = view.dtype == torch.bfloat16 and source.ndim == 2 and source.stride(1) == 1
    if not taken_by_rows or beside or target.shape[-1] != columns or not target.is_contiguous():
        raise CannotReplay(f"{name}, {view.dtype}, does not fill whole rows of {copy.tensor}")
    if by_vllm:  # the scale is made from all columns, also of those for other workers
        length, step = view.shape[-1], source.stride(0)
        before = copy.source.storage_offset() % length
        if step % length and len(source) > 1 or before + columns > length:
            raise CannotReplay(f"rows of {copy.tensor} are no parts of rows of {name}")
        whole = view.as_strided((len(source), length), (step, 1), offset - before)
    span = slice(first, first + len(source))
    qdata, scale = qdata.detach().flatten(0, -2)[span], scale.detach().flatten(0, -2)[span]
    tensors = (source, whole, qdata, scale)
    if any(tensor.data_ptr() % 16 for tensor in tensors[:3]):
        raise CannotReplay(f"rows of {copy.tensor} are at no multiples of 16 bytes")
    rows.setdefault((*source.shape, source.stride(0), whole.shape[1], by_vllm), []).append(tensors)


def failure(call: Callable, *args) -> str | None:
    """Make a call that all workers make; all get what any of them returned or raised. None: all is well."""
    reasons, group = [None] * get_world_group().world_size, get_world_group().cpu_group
    try:
        reason = call(*args)
    except Exception as error:
        logger.exception(reason := f"{type(error).__name__}: {error}")
    dist.all_gather_object(reasons, reason, group=group)
    return "; ".join(sorted(set(filter(None, reasons)))) or None


class OnlineQuantTransfer(NCCLWeightTransferEngine):
    """vLLM's own weight transfer, `{"backend": "online-quant"}`, from the senders of its "nccl" backend.

    When the first sender joins, replays prove themselves by the checkpoint that was loaded. Weights by other
    names than its, or in parts, come by a session. A request that meets half an update ends the server."""

    supports_draft_weight_update = False

    def __init__(self, *args):
        super().__init__(*args)
        self.worker, self.torn = WorkerExtension.newest, False
        self.known = self.because = self.cold = self.last = None  # proved; why no replays; as loaded; agreed
        self.worker.after_loading = Reached(self.model).digests()
        plain = self.worker.model_runner.execute_model
        self.worker.model_runner.execute_model = functools.partial(self._execute_model, plain)

    def _execute_model(self, plain, scheduled, *args, **kwargs):
        if self.torn and scheduled.total_num_scheduled_tokens:
            raise RuntimeError("refusing to generate: a weight update is not complete; send all weights")
        return plain(scheduled, *args, **kwargs)

    @collective
    def init_transfer_engine(self, init_info) -> None:
        """Join the sender's group. Raises RuntimeError if it does not come, or if syncs cannot be proved."""
        before = vars(self).copy()
        joining = set_default_torch_dtype(torch.float32)(super().init_transfer_engine)  # as senders warm up
        if failed := failure(joining, init_info):
            vars(self).update(before)  # as the last sender has it: its group, how it packs
            raise RuntimeError(failed)
        if before["model_update_group"] is not None:
            before["model_update_group"].destroy()
        self.model_update_group.timeout_s = 60.0  # for each bucket
        self.worker._weight_update_active = False  # of a sender that has died
        if self.known is None:
            self.prove()

    def start_weight_update(self) -> None:
        """From now on no request is served, until all weights have come."""
        self.torn = True
        self.worker._drop_session()

    def _agree(self, manifest: Iterator[list], bucket_bytes: int) -> str | None:
        self.last = self.worker.buckets = self.worker.replay = None  # frees them
        self.cold, manifest = (self.torn and self.cold) or self.worker._reached().digests(), [*manifest]
        _, because = self.worker.agree_on_weights.__wrapped__(self.worker, manifest, bucket_bytes)
        self.last = manifest, bucket_bytes, self.worker.buckets  # the next such update needs none of this
        return because

    def prove(self) -> None:
        """Once, as `prove_sync` does, answers excepted. Raises RuntimeError. All workers have to call it."""
        loader = model_loader.get_model_loader(self.vllm_config.load_config)
        read = functools.partial(loader.get_all_weights, self.model_config, self.model)
        manifest = ([name, str(weight.dtype)[6:], list(weight.shape)] for name, weight in read())

        def go_through(moves: list[tuple]) -> str | None:
            wrong, seen, self.torn = set(), {"own": self.cold}, True  # it writes
            for zero, weights, path in moves:
                if zero:
                    self.worker.zero_weights.__wrapped__(self.worker, zero)
                self.worker._take_in(self.worker.buckets.fill(read(), weights == "others"), path == "session")
                now = self.worker._reached().digests()
                wrong |= {name for name, _ in seen.setdefault(weights, now).items() ^ now.items()}
            return f"not as it was before: {some(sorted(wrong))}" if wrong else None

        self.because = failure(self._agree, manifest, BUCKET_BYTES)
        if failure(lambda: None if self.last else "not ready"):  # nothing is written yet: it serves on
            self.last = self.worker.buckets = self.worker.replay = None
            raise RuntimeError(f"this model cannot be synced: {self.because}")
        for moves in [SESSIONS] if self.because else [REPLAYS, SESSIONS]:
            if not (found := failure(go_through, moves)):
                self.known, self.torn = sorted((name, shape) for name, _, shape in self.last[0]), False
                tensors = f"{len(self.cold)} tensors. {self.because or ''}"
                return tell(f"online-quant: proved by {moves[0][2]}, {tensors}")
            self.because = "; ".join(filter(None, (self.because, found)))
        raise RuntimeError(f"this model cannot be synced: {self.because}")

    @collective
    def receive_weights(self, update_info) -> None:
        """Receive weights, all or a part, of any floating-point type. Raises RuntimeError."""
        info = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        manifest, worker = [[name, dtype, list(shape)] for name, dtype, shape in info], self.worker
        size, self.torn = self.packed_buffer_size_bytes if self.packed else 0, True
        wire = Buckets(manifest, size, self.model_update_group, self.device, as_vllm=True)
        with to_the_end(wire.receive_from_vllm()) as weights:
            if self.known is None:
                raise RuntimeError(f"this model cannot be synced: {self.because or 'it was not proved'}")
            because, small = self.because, min(BUCKET_BYTES, size // 4)  # spans two of vLLM's at most
            if sorted((name, shape) for name, _, shape in manifest) != self.known:
                because = because or "these are not all weights of the checkpoint, by their names there"
            if not because and (manifest, small, worker.buckets) != self.last:
                because = self.because = failure(self._agree, manifest, small)
            if because:
                tell(f"online-quant: {len(manifest)} weights by a session, because {because}")
                worker.buckets = worker.replay = self.last = None  # frees them
                worker.session = worker.session or worker._open_session()
                worker.session.load((name, weight.clone()) for name, weight in weights)
            else:
                worker._take_in(worker.buckets.fill(weights), by_session=False)
                self.torn = False

    @collective
    def finish_weight_update(self) -> None:
        """Raises RuntimeError, which names them, if weights are missing."""
        if self.torn:
            session, self.worker.session = self.worker.session or self.worker._open_session(), None
            session.complete()
        self.torn = False


# ----- 7. Bytes: digests, and rows quantized as torchao and vLLM do it --------------------------------------
def digest(tensor: Tensor) -> Tensor:
    """64-bit checksum of a tensor's bytes, as an int64 scalar on its device: no copy to the host, no waiting.

    The sum over i of (2i + 1) word_i modulo 2^64: any one changed word changes it, and so do two swapped ones
    unless distance times difference is a multiple of 2^63. For accidents, not attackers."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 8 or data.storage_offset() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))  # a copy, at the start of its memory
    words = data.view(torch.int64)
    count, index = len(words) // 4096, lambda size: torch.arange(size, device=words.device)
    rows, rest = words[: 4096 * count].view(count, 4096), words[4096 * count :]  # i is 4096 row + column
    total = (rows.sum(0) * (2 * index(4096) + 1)).sum() + 8192 * (rows.sum(1) * index(count)).sum()
    return total + (rest * (2 * index(len(rest)) + 8192 * count + 1)).sum()


class Rows:
    """Rows of BF16 weights of one kind, for one launch: a bucket may hold hundreds of matrices.

    They get FP8 e4m3 bytes and one FP32 scale each, bit-identical to torchao 0.18's PerRow, which makes it
    from the columns that a worker gets and rounds amax / 448 to BF16 (zeros get scale 1); or to vLLM 0.32's
    `fp8_per_channel`, which makes it from whole rows, without rounding, and at least 1 / (448 * 512).
    `kind`: rows, columns, stride of a row, columns if whole, vLLM's? `tensors`, by matrix: source (rows,
    columns), whole (rows, all columns), bytes as source, scales (rows, 1); at multiples of 16 bytes."""

    def __init__(self, kind: tuple, tensors: list[tuple[Tensor, ...]]):
        self.kind, self.tensors = kind, tensors
        table = [[tensor.data_ptr() for tensor in each] for each in tensors]
        self.addresses = torch.tensor(table, device=tensors[0][0].device)

    def quantize(self) -> None:
        """Source to bytes and scales."""
        count, columns, step, length, by_vllm = self.kind
        if self.addresses.is_cuda:
            block, whole = triton.next_power_of_2(columns), triton.next_power_of_2(length)
            sizes = (step, columns, length, block, whole if length > columns else 0, by_vllm)
            warps = min(16, max(1, whole // 1024))
            quantize_rows_kernel[(count, len(self.tensors))](self.addresses, *sizes, num_warps=warps)
            return
        for source, whole, qdata, scale in self.tensors:
            limit, amax_R1 = torch.finfo(qdata.dtype).max, whole.abs().amax(dim=1, keepdim=True)
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
    addresses, step, columns, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr, BY_VLLM: tl.constexpr
):
    """One program a row, which stays in registers: it is read once (in part twice) and written once."""
    row, column, entry = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), addresses + 4 * tl.program_id(1)
    source = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.bfloat16)), 16)
    whole = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.bfloat16)), 16)
    qdata = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float8e4nv)), 16)
    scale = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    x = tl.load(source + row * step + column, mask=column < columns, other=0.0).to(tl.float32)
    seen = x
    if WHOLE > 0:  # the scale is not made from these columns alone
        at = tl.arange(0, WHOLE)
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
    tl.store(qdata + row * columns + column, quotient.to(tl.float8e4nv), mask=column < columns)
    tl.store(scale + row, tl.where(dead, 1.0, row_scale))


# ----- 8. The patches ---------------------------------------------------------------------------------------
@functools.cache
def patch_libraries() -> None:
    """What a worker changes in torchao and vLLM before it has a model. Importing this file does not."""

    def watch_loading(model: torch.nn.Module, plain=model_loader.utils.record_metadata_for_reloading) -> None:
        plain(model)
        model.digests_before_loading = Reached(model).digests()

    # Why: vLLM has no such backend. Delete when: it has.
    WeightTransferEngineFactory.register_engine("online-quant", OnlineQuantTransfer)
    # Why: called before loading, it tells `zero_weights` what that has written. Delete when: vLLM tells.
    model_loader.utils.record_metadata_for_reloading = watch_loading

    plain_quantize = vllm_torchao.torchao_quantize_param_data
    # Why: torchao 0.18 divides an all-zero row (or one whose amax / 448 underflows) by its scale of 0: NaN.
    # Delete when: torchao gives such a row any scale but 0.
    vllm_torchao.torchao_quantize_param_data = lambda *args: repair_zero_rows(plain_quantize(*args))

    plain_setup = UnquantizedFusedMoEMethod._setup_kernel

    def pack_again(self, layer, w13: Tensor, w2: Tensor) -> None:
        self.moe_kernel = None if w13.is_cpu else self.moe_kernel
        plain_setup(self, layer, w13, w2)

    # Why: on the CPU vLLM packs experts only where there is no kernel yet. Delete when: a reload packs them.
    UnquantizedFusedMoEMethod._setup_kernel = pack_again

    def scaled_mm(a, a_scale, b, b_scale, output_dtype, output_scale=None, bias=None, use_fast_accum=False):
        """Activations (M, K) by weights (K, N), both FP8, with scales (M, 1) and (1, N); (M, N)."""
        if not a.is_cuda:
            return torch._scaled_mm(a, b, a_scale, b_scale, bias=bias, out_dtype=output_dtype)
        output = a.new_empty(a.shape[0], b.shape[1], dtype=output_dtype)
        torch.ops._C.cutlass_scaled_mm(output, a, b, a_scale, b_scale, bias)
        return output

    # Why: for a scale per row cuBLAS takes tiles of 128 x 128, which leave most of a GPU idle in decoding;
    # vLLM's are faster there, and about the same beyond. Delete when: torch's is as fast at 1 to 128 rows.
    float8_tensor.addmm_float8_unwrapped_inference = scaled_mm

    @Float8Tensor.implements(torch.ops.aten.empty_like.default)
    def _(function, types, args, kwargs):
        # Why: without it vLLM cannot store what it has compiled, and every start of an engine compiles anew.
        # Delete when: torchao's Float8Tensor has `empty_like` (0.18 has not).
        return args[0]._apply_fn_to_data(lambda tensor: function(tensor, **kwargs))

    # Why: with AVX-512 vLLM computes with packed copies of BF16 weights; a session leaves some of them old
    # (of tied heads, biases, convolutions). Delete when: it makes all of them anew.
    plain_linear = {"cpu_linear": torch.nn.functional.linear}
    layer_utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: vars(layer).update(plain_linear)

    # Why: vLLM pads layers to multiples of 16, then sets their loaders once more, which its function forbids.
    # Delete when: an engine whose linear layer has 8 outputs starts with `fp8_per_channel`.
    cutlass.set_weight_attrs = lambda weight, attributes: vars(weight).update(attributes)


def repair_zero_rows(weight: Tensor) -> Tensor:
    """Give FP8 blocks (PerRow: rows) with scale 0 zero bytes and scale 1, in place; returns the weight."""
    if isinstance(weight, Float8Tensor) and (dead := weight.scale == 0).any():  # one for each block
        mask = dead
        for dimension, size in enumerate(weight.block_size):
            mask = mask.repeat_interleave(size, dimension).narrow(dimension, 0, weight.shape[dimension])
        weight.qdata.view(torch.uint8).masked_fill_(mask, 0)
        weight.scale.masked_fill_(dead, 1.0)
    return weight
