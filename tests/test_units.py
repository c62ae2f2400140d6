"""Small pieces of the helper, and what the driver makes of flags and prompts."""

import contextlib
import doctest
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import triton
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, processors
from torchao.float8.inference import Float8MMConfig, addmm_float8_unwrapped_inference
from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor
from torchao.quantization.quantize_.workflows.float8 import float8_tensor
from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm.model_executor.layers.quantization.online import fp8 as online_fp8
from vllm.model_executor.layers.quantization.utils.quant_utils import weight_amax

import rlhf_utils
from harness import driver
from make_tiny import byte_tokenizer
from random_models import SHAPES, write_config
from rlhf_utils import (
    Buckets,
    Copy,
    Replay,
    Rows,
    digest,
    plan_buckets,
    quantize_rows_kernel,
    repair_zero_rows,
    to_the_end,
    wire_manifest,
)

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]  # the kernels for GPUs: run this file there as well


def test_documentation_examples():
    assert doctest.testmod(rlhf_utils).failed == 0


def test_digest_sees_order_and_single_bits():
    """A plain sum would miss swapped rows, columns and words."""
    torch.manual_seed(0)
    data = torch.randn(3000, 257)  # neither a multiple of 8 bytes nor of the digest's row
    swapped_rows, swapped_words, flipped = data.flip(0), data.clone(), data.clone()
    swapped_words.view(-1)[[0, 2]] = data.view(-1)[[2, 0]]
    flipped.view(torch.int32)[-1, -1] ^= 1
    part = data.bfloat16()[1:5]  # whole words, at no multiple of their size
    assert digest(part) == digest(part.clone())
    values = {digest(t).item() for t in (data, swapped_rows, swapped_words, flipped)}
    assert len(values) == 4 and digest(data.clone()).item() in values
    assert digest(data.t()).item() == digest(data.t().contiguous()).item() not in values
    assert digest(torch.zeros(0)).item() == 0 and digest(torch.ones(3, dtype=torch.uint8)).item() != 0


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_not_finite_are_found(device):
    """NaN, infinity, and what becomes infinite in BF16; whole numbers and empty weights are left alone."""
    model = torch.nn.ParameterDict({name: torch.ones(3, 4) for name in ("a", "nan", "inf", "huge", "b")})
    model["empty"], model["fp16"] = torch.ones(0, 4), torch.ones(2, dtype=torch.float16)
    model["nan"].data[2, 3], model["inf"].data[0, 0], model["huge"].data[1, 1] = math.nan, -math.inf, 3.4e38
    model.register_buffer("count", torch.tensor(3))
    with pytest.raises(
        ValueError, match="3 weights hold NaN or infinity and were not sent: huge, inf, nan. Go on"
    ):
        rlhf_utils.WeightSender(model.to(device), device).prepare_weights()
    for name in ("nan", "inf", "huge"):
        torch.nn.init.ones_(model[name])
    names = [name for name, _, _ in rlhf_utils.WeightSender(model, device).prepare_weights()]
    assert sorted(names) == ["a", "b", "count", "fp16", "huge", "inf", "nan"]


def test_ipv6_and_names():
    """Two ranks meet at ::1, and at a host name."""
    for address in ("::1", "localhost"):
        listening, results = rlhf_utils.listen(address), {}
        port = listening.getsockname()[1]
        settings = dict(world_size=2, device="cpu", timeout_s=10)

        def join(rank: int, **more) -> None:
            results[rank] = rlhf_utils.stateless_init_process_group(address, port, rank, **settings, **more)

        threads = [threading.Thread(target=join, args=(0,), kwargs={"listen_socket": listening})]
        threads.append(threading.Thread(target=join, args=(1,)))
        tensors = [torch.arange(5.0), torch.zeros(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        threads = [
            threading.Thread(target=results[rank].broadcast, args=(tensors[rank], 0)) for rank in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert torch.equal(*tensors)


def test_buckets_hold_every_weight_once_without_overlap():
    manifest = [[f"w{i}", dtype, [3 * i + 1, 7]] for i, dtype in enumerate(["float32", "bfloat16"] * 8)]
    manifest += [["wide", "bfloat16", [2, 300]], ["scalar", "bfloat16", []], ["bias", "bfloat16", [500]]]
    found = []
    for size, pieces in plan_buckets(manifest, 256):
        ends = [offset + nbytes for _, offset, nbytes, *_ in pieces]
        assert all(end <= piece[1] for end, piece in zip(ends, pieces[1:])) and ends[-1] <= size
        assert size <= 256 or len(pieces) == 1, "only a larger weight may exceed a bucket, and alone"
        assert all(offset % 16 == 0 for _, offset, *_ in pieces)
        found += [[name, str(dtype)[6:], shape] for name, _, _, dtype, shape in pieces]
    assert found == manifest


def odd_rows(columns: int, device: str) -> torch.Tensor:
    """128 in BF16: random, huge, tiny, denormal, one-hot, infinite, NaN and zero."""
    torch.manual_seed(0)
    rows = torch.randn(128, columns, device=device) * torch.logspace(-38, 38, 128, device=device).unsqueeze(1)
    rows[0], rows[1], rows[2, 1:], rows[3, 0] = 0, 1e-40, 0, float("inf")
    rows[4], rows[5, 3], rows[6], rows[7, 2] = torch.finfo(torch.bfloat16).max, -448, 2.0**-133, float("nan")
    return rows.bfloat16()


def quantized(rows: torch.Tensor, first: int, columns: int, by_vllm: bool) -> tuple:
    """Bytes and scales of some columns of rows."""
    qdata = torch.zeros(len(rows), columns, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.zeros(len(rows), 1, device=rows.device)
    source = rows[:, first : first + columns]
    whole = rows if by_vllm else source
    kind = (*source.shape, rows.stride(0), whole.shape[1], by_vllm)
    Rows(kind, [(source, whole, qdata, scale)]).quantize()
    return qdata.view(torch.uint8), scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [16, 80, 768, 4096, 17408])
def test_quantize_rows_is_torchao_bit_for_bit(columns, device):
    """Only all-zero rows differ, by the repair."""
    rows = odd_rows(columns, device)
    expected = Float8Tensor.from_hp(rows, granularity=PerRow())
    repair_zero_rows(expected)
    # As a tensor-parallel shard lies in its weight.
    within = torch.randn(128, 3 * columns, device=device).bfloat16()[:, columns : 2 * columns]
    within.copy_(rows)
    for source in (rows, within):
        qdata, scale = quantized(source, 0, columns, by_vllm=False)
        assert torch.equal(qdata, expected.qdata.view(torch.uint8))
        torch.testing.assert_close(scale, expected.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [16, 80, 768, 4096, 17408])
def test_quantize_rows_is_vllms_fp8_per_channel_bit_for_bit(columns, device):
    """A worker's columns have the scale of the whole row, over all workers."""
    rows = odd_rows(columns, device)
    rows[3], rows[7] = 1.0, 2.0  # vLLM's minimum and maximum treat NaN as the device likes
    scale = online_fp8._fp8_channel_scale(weight_amax(rows, dim=-1, keepdim=True))
    bytes_of_rows = online_fp8._fp8_quant_per_channel(rows, scale).view(torch.uint8)
    for first, count in ((0, columns), (columns // 2, columns // 2), (0, columns // 2)):
        qdata, found = quantized(rows, first, count, by_vllm=True)
        assert torch.equal(qdata, bytes_of_rows[:, first : first + count]) and torch.equal(found, scale)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bucket_bytes", [5_000, 10**6])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_replayed_as_vllm_quantizes_them(rank, bucket_bytes, fused):
    """`fp8_per_channel` on made-up tensors (vLLM has no FP8 experts on the CPU), of the second of two workers
    as well: gate and up one above the other in w13, half of down's columns in w2; in one bucket and in many.
    Fused: one weight for all experts, of which each is copied for itself.
    """
    torch.manual_seed(0)
    experts, inner, hidden = 6, 32, 48
    half = slice(rank * inner // 2, (rank + 1) * inner // 2)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    of_all = {kind: torch.randn(experts, *shape).bfloat16() for kind, shape in shapes.items()}
    loaded = {"w13": torch.zeros(experts, inner, hidden), "w2": torch.zeros(experts, hidden, inner // 2)}
    loaded = {name: tensor.bfloat16() for name, tensor in loaded.items()}
    layer, weights, copies = torch.nn.Module(), {}, {}
    for name, tensor in loaded.items():
        fp8 = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        layer.register_parameter(name, torch.nn.Parameter(fp8, requires_grad=False))
        scale = torch.nn.Parameter(torch.zeros(*tensor.shape[:-1], 1), requires_grad=False)
        layer.register_parameter(f"{name}_scale", scale)
    for kind, i in itertools.product(shapes, range(experts)):
        tensor = "w2" if kind == "down" else "w13"
        target = loaded[tensor][i]
        target = target if kind == "down" else target.chunk(2)[kind == "up"]
        name, weight = (kind, of_all[kind]) if fused else (f"{kind}.{i}", of_all[kind][i])
        weights[name] = weight
        within, whole = (
            of_expert[:, half] if kind == "down" else of_expert[half]
            for of_expert in ((weight[i], weight.to("meta")[i]) if fused else (weight, weight.to("meta")))
        )
        on_meta = loaded[tensor].to("meta")
        at = on_meta.as_strided(target.shape, target.stride(), target.storage_offset())
        copies.setdefault(name, []).append(Copy(whole, at, tensor, on_meta))
        target.copy_(within)
    manifest = [[name, "bfloat16", list(weight.shape)] for name, weight in weights.items()]
    buckets = Buckets(manifest, bucket_bytes, SimpleNamespace(rank=1), torch.device("cpu"))
    replay = Replay(layer, copies, buckets)
    for number, (_, pieces) in enumerate(buckets.buckets):
        for name, view in pieces:
            view.copy_(weights[name])
        replay(number)
    # What both workers have to agree on.
    amax = {
        "w13": weight_amax(loaded["w13"], dim=-1, keepdim=True),
        "w2": weight_amax(of_all["down"], dim=-1, keepdim=True),
    }
    for name, tensor in loaded.items():
        scale = online_fp8._fp8_channel_scale(amax[name])
        qdata = online_fp8._fp8_quant_per_channel(tensor.flatten(0, 1), scale.flatten(0, 1))
        assert torch.equal(getattr(layer, f"{name}_scale"), scale)
        assert torch.equal(getattr(layer, name).flatten(0, 1).view(torch.uint8), qdata.view(torch.uint8))


def test_fused_experts_travel_as_views_of_the_model(tmp_path, monkeypatch):
    """As in the file, without a copy; they follow changes, and parameters that are replaced."""
    set_seed(0)
    model, known = AutoModelForCausalLM.from_config(SHAPES["small-qwen3-moe"]), {}
    model.save_pretrained(tmp_path)
    in_file = load_file(tmp_path / "model.safetensors")
    experts = model.model.layers[1].mlp.experts

    def sent() -> dict:
        return dict(rlhf_utils.checkpoint_weights(model, model.state_dict(keep_vars=True), known))

    for _ in range(2):
        found = sent()
        assert found.keys() == in_file.keys()
        assert all(torch.equal(tensor, in_file[name]) for name, tensor in found.items())
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} == own
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    with torch.no_grad():
        experts.gate_up_proj[3, -1, -1] = 7
    assert found[up][-1, -1] == sent()[up][-1, -1] == 7
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros_like(experts.gate_up_proj))
    assert not sent()[up].any() and found[up].any()
    # What is computed is computed each time.
    plain = rlhf_utils.revert_weight_conversion
    monkeypatch.setattr(
        rlhf_utils,
        "revert_weight_conversion",
        lambda *args: {name: tensor + 1 for name, tensor in plain(*args).items()},
    )
    known.clear()
    assert sent()[up].eq(1).all() and sent()[up].eq(1).all() and set(known.values()) == {None}


@pytest.mark.parametrize("copies", [False, True])
def test_what_is_sent_is_what_is_there(copies):
    """The model's state is taken once, for the look at it and to send it, unless something has changed since,
    or the model's hooks make copies, which tell nothing. Whoever looks alone (a checkpoint) leaves none."""
    model = AutoModelForCausalLM.from_config(SHAPES["tiny-opt"])
    taken, norm = [], model.model.decoder.final_layer_norm

    def take(module, state, *_):
        taken.append(1)
        state.update({name: tensor.clone() for name, tensor in state.items()} if copies else {})

    model._register_state_dict_hook(take)
    sender = rlhf_utils.WeightSender(model, "cpu")

    def sent() -> torch.Tensor:
        sender.prepare_weights()
        return dict(sender.weights())["model.decoder.final_layer_norm.weight"]

    sender.check_finite()
    assert torch.equal(sent(), norm.weight) and len(taken) == 1 + copies
    sender.check_finite()
    with torch.no_grad():
        norm.weight.mul_(2)
    assert torch.equal(sent(), norm.weight)
    sender.check_finite()
    norm.weight = torch.nn.Parameter(3 * norm.weight.detach())
    assert torch.equal(dict(sender.weights())["model.decoder.final_layer_norm.weight"], norm.weight)


def test_kernels_compile_for_hopper():
    """To machine code, without a GPU: otherwise a slip in a kernel would show on GPUs only."""
    sizes = {"step": "i32", "columns": "i32", "length": "i32"}
    constants = dict.fromkeys(["BLOCK", "WHOLE", "BY_VLLM"], "constexpr")
    row_types = {"addresses": "*i64"} | sizes | constants
    compiled = []
    for kernel, types, values in (
        (quantize_rows_kernel, row_types, (4096, 0, False)),
        (quantize_rows_kernel, row_types, (2048, 4096, True)),
    ):
        constants = {(len(types) - len(values) + i,): value for i, value in enumerate(values)}
        attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types) - len(values))}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
        compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm)
        assert compiled[-1]["cubin"]
    assert "ld.global.v4" in compiled[0]["ptx"], "rows are read 16 bytes at a time"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [0, 5, 8, 32_767, 32_768, 80_008, 1_000_003])
def test_digest_is_its_formula(size, device):
    """On the CPU and on GPUs, which must agree when a trainer on one sends to an engine on the other."""
    data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    words = torch.nn.functional.pad(data, (0, -size % 8)).view(torch.int64).tolist()
    expected = sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**64
    assert digest(data.to(device)).item() % 2**64 == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 128, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm_is_torchaos(rows, device, bias, monkeypatch):
    """Both kernels, as they are and compiled, against torchao's own product and the full-precision one."""
    torch.manual_seed(0)
    kwargs = {"act_quant_kwargs": QuantizeTensorToFloat8Kwargs(granularity=PerRow()), "granularity": PerRow()}
    full, x = torch.randn(64, 96, device=device).bfloat16(), torch.randn(rows, 96, device=device).bfloat16()
    weight = Float8Tensor.from_hp(full, mm_config=Float8MMConfig(use_fast_accum=True), **kwargs)
    bias = torch.randn(64, device=device).bfloat16() if bias else None
    rlhf_utils.patch_libraries()
    patched, products = float8_tensor.addmm_float8_unwrapped_inference, {}
    for ours in (False, True):
        product = patched if ours else addmm_float8_unwrapped_inference
        monkeypatch.setattr(float8_tensor, "addmm_float8_unwrapped_inference", product)
        torch.compiler.reset()
        compiled = torch.compile(torch.nn.functional.linear, dynamic=True, fullgraph=True)
        products[ours] = [linear(x, weight, bias) for linear in (torch.nn.functional.linear, compiled)]
    torch.testing.assert_close(products[True], products[False], rtol=2**-7, atol=2**-7)
    error = products[True][0] - torch.nn.functional.linear(x, full, bias)
    assert error.float().norm() < 0.06 * (x @ full.t()).float().norm()


def test_workers_with_other_experts_want_the_same_dtypes():
    """Of an FP32 trainer: what only another worker copies travels as it wants it; integers as they are."""
    manifest = [
        ["a", "float32", [2]],
        ["b", "float32", [2]],
        ["router", "float32", [2]],
        ["ids", "int64", [2]],
    ]
    to_bf16, to_fp32 = (
        Copy(None, torch.empty(2, dtype=d), "", None) for d in (torch.bfloat16, torch.float32)
    )
    plain = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as `collective` sets it
    try:
        both = [wire_manifest(manifest, {name: [to_bf16], "router": [to_fp32]}) for name in "ab"]
        assert both[0] == both[1] == [["a", "bfloat16", [2]], ["b", "bfloat16", [2]], *manifest[2:]]
        assert wire_manifest(manifest, {}) == manifest
    finally:
        torch.set_default_dtype(plain)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_alone_are_no_fp8(dtype):
    """INT8 has them as well."""
    model = torch.nn.Sequential(torch.nn.Module())
    for name, value in (("weight", torch.zeros(4, 2, dtype=dtype)), ("weight_scale", torch.ones(4, 1))):
        model[0].register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    own = SimpleNamespace(get_model=lambda: model, rank=0)
    found = rlhf_utils.WorkerExtension.inspect_weights.__wrapped__(own)
    is_fp8 = dtype == torch.float8_e4m3fn
    assert found["fp8_linear_layers"] == is_fp8 and found["fp8_gib"] == 8 * is_fp8 / 2**30
    assert found["weights_gib"] == 24 / 2**30


def test_a_broadcast_that_does_not_end_is_aborted():
    """NCCL would spin for ever, and vLLM's communicator would then do nothing, silently, when it is asked
    again.
    """
    group = SimpleNamespace(rank=1, timeout_s=0.05, disabled=False)
    group.destroy = lambda: setattr(group, "disabled", True)
    buckets = Buckets([[f"w{i}", "float32", [4]] for i in range(3)], 16, group, torch.device("cpu"))
    buckets.events = [SimpleNamespace(query=lambda: False)]
    with pytest.raises(TimeoutError, match=r"rank 1, bucket 1 of 3 \(w0 .. w0\): no progress for 0.05 s"):
        buckets.finish(0)
    with pytest.raises(
        ConnectionError, match="rank 1, bucket 2 of 3 .*: this group was given up after an error"
    ):
        buckets.start(buckets.digests)
    group.disabled, group.broadcast = False, lambda *_, **__: None
    event = SimpleNamespace(query=lambda: False, record=lambda: None, wait=lambda: None)
    buckets.streams = SimpleNamespace(**vars(torch.cpu) | {"Event": lambda: event})
    with pytest.raises(TimeoutError, match="bucket 1 of 3"), to_the_end(buckets.receive()) as numbers:
        list(buckets.weights(numbers))  # and what is left cannot come either, but that is not the cause


def test_zero_rows_are_repaired():
    """torchao 0.18 gives NaN for a zero row, and 448 for a row whose scale underflows to 0."""
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    weight[3], weight[7] = 0, 1e-40
    broken = Float8Tensor.from_hp(weight)
    assert broken.qdata[3].float().isnan().all() and broken.qdata[7].float().isfinite().all()
    expected = broken.dequantize().clone()
    expected[[3, 7]] = 0
    assert repair_zero_rows(broken) is broken
    assert torch.equal(broken.dequantize(), expected) and (broken.scale > 0).all()


def test_zero_blocks_of_any_granularity_are_repaired():
    """One scale for all, and one for each block of 128 x 128."""
    weight = torch.randn(256, 384, dtype=torch.bfloat16)
    weight[:128, 128:256] = 0
    for broken in (
        Float8Tensor.from_hp(weight, granularity=PerBlock([128, 128])),
        Float8Tensor.from_hp(torch.zeros_like(weight), granularity=PerTensor()),
    ):
        assert (broken.scale == 0).sum() == 1
        repair_zero_rows(broken)
        assert (broken.qdata.view(torch.uint8)[:128, 128:256] == 0).all() and (broken.scale > 0).all()
        assert broken.dequantize().isfinite().all()


def test_answers_keep_their_first_space():
    """As vLLM decodes them, token by token; a tokenizer of words with marks for spaces drops the first."""
    words = Tokenizer(models.WordLevel({"▁What": 0, "▁is": 1, "▁4": 2, "▁.": 3, "</s>": 4}, unk_token="</s>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", clean_up_tokenization_spaces=True
    )

    def text(prompt: list[int], answer: list[int]) -> str:
        said = SimpleNamespace(token_ids=answer, logprobs=SimpleNamespace(logprobs=[]), finish_reason="stop")
        engine = SimpleNamespace(generate=lambda *_, **__: [SimpleNamespace(outputs=[said])])
        engine.get_tokenizer, engine.weights_version = lambda: tokenizer, 0
        prompts = [driver.Prompt("", {}, prompt, "")]
        return driver.RolloutLLM.rollout(engine, prompts, [{}])[0][0].text

    assert text([0, 1], [2, 3, 4]) == " 4 ."
    assert text([], [2]) == text([4], [2]) == "4"


def test_the_reaper_kills_what_carries_its_mark():
    """Also what was orphaned at once; another's child, a tracker's service for example, lives on."""
    sleep = "subprocess.Popen(['sleep', '60'], env={'RLHF_RUN': mark}, stdout=subprocess.DEVNULL)"
    start = f"import subprocess; print([{sleep}.pid for mark in ('this', 'other')])"
    started = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, check=True)
    marked, other = map(psutil.Process, json.loads(started.stdout))
    command = ["sh", "-c", driver.REAPER, "RLHF_RUN=this"]
    reaper = subprocess.Popen([*command, str(os.getpid())])
    time.sleep(1)
    assert reaper.poll() is None and marked.is_running(), "this process, whose child it is, has not ended"
    reaper.kill()
    # The program that ends leaves a fork, which holds all that it had open.
    ended = f"import subprocess, os, time; subprocess.Popen([*{command}, str(os.getpid())])"
    ended += "; os.fork() or (time.sleep(30), os._exit(0))"
    subprocess.run([sys.executable, "-c", ended], check=True)
    deadline = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):  # who has adopted it may leave it as a zombie
        while marked.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert other.is_running()
    other.kill()


def test_zero_activation_rows_stay_finite():
    """Dynamic quantization divides by an activation row's scale too; the bound must leave every other row
    alone.
    """
    bound = driver.TORCHAO_CONFIGS["fp8-dynamic"].activation_value_lb
    activations = torch.randn(8, 64, dtype=torch.bfloat16)
    activations[2] = 0
    plain, bounded = Float8Tensor.from_hp(activations), Float8Tensor.from_hp(activations, hp_value_lb=bound)
    assert plain.dequantize()[2].isnan().all() and (bounded.dequantize()[2] == 0).all()
    others = [i for i in range(8) if i != 2]
    assert torch.equal(plain.dequantize()[others], bounded.dequantize()[others])


@pytest.mark.parametrize(
    ("gpus", "flags", "wanted"),
    [
        (1, {}, (1, 2)),
        (2, {}, (1, 2)),
        (2, dict(tensor_parallel_size=4, trainer_device="cpu"), (0, 4)),
        (5, dict(num_engines=3), (1, 6)),
        (0, dict(trainer_device="cuda"), (1, 0)),
    ],
)
def test_too_few_gpus(gpus, flags, wanted):
    """What is there, what is wanted, and flags that fit."""
    with pytest.raises(ValueError) as error:
        driver.resolve(driver.Config(**flags), gpus)
    found, advice = str(error.value).split("What fits here: ")
    assert tuple(map(int, re.findall(r"\d+", found))) == (gpus, *wanted)
    words = advice.split()
    advice = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    driver.resolve(driver.Config(**flags | advice), gpus)


def test_defaults_follow_the_machine(tmp_path, monkeypatch):
    on_gpus, device = driver.resolve(driver.Config(), 3)
    assert (device, on_gpus.model, on_gpus.quantization) == ("cuda", "facebook/opt-125m", "fp8-dynamic")
    assert (on_gpus.trainer_device, on_gpus.learning_rate, on_gpus.epochs) == ("cuda", 1e-6, 1)
    assert (on_gpus.reward, on_gpus.prompts_file, on_gpus.held_out_file) == ("letters", None, None)
    on_cpu, device = driver.resolve(driver.Config(), 0)
    assert (device, on_cpu.model, on_cpu.quantization) == ("cpu", str(driver.TINY), "fp8-weight-only")
    assert (on_cpu.trainer_device, on_cpu.learning_rate, on_cpu.epochs) == ("cpu", 2e-3, 3)
    assert (on_cpu.reward, on_cpu.held_out_file) == ("backwards", driver.TINY / "held_out.jsonl")
    monkeypatch.chdir(driver.TINY.parent)
    by_path, _ = driver.resolve(driver.Config(model="tiny", resume="checkpoint-1", output_dir="out"), 3)
    assert (by_path.model, by_path.prompts_file) == (on_cpu.model, driver.TINY / "prompts.jsonl")
    assert by_path.resume == driver.Path.cwd() / "checkpoint-1" and by_path.output_dir.is_absolute()
    own, _ = driver.resolve(driver.Config(prompts_file="prompts.txt"), 0)
    assert (own.reward, own.held_out_file, own.learning_rate) == ("letters", None, 2e-3)
    given, _ = driver.resolve(driver.Config(reward="backwards", epochs=3, learning_rate=0), 3)
    assert (given.reward, given.epochs, given.learning_rate) == ("backwards", 3, 0)


@pytest.mark.parametrize(
    "content", [None, "not json", '{"a": 1}', '"text"', '{"_type": "NoSuchConfig", "_data": {}}']
)
def test_bad_quantization(tmp_path, content):
    file = tmp_path / "torchao.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        ValueError,
        match="expected fp8-dynamic, fp8-weight-only, fp8_per_channel, .*, none, or a file with the JSON of",
    ):
        driver.quantization_arguments(str(file))


def test_serialized_config_is_the_same_as_the_named_one(tmp_path):
    file = tmp_path / "torchao.json"
    for name, config in driver.TORCHAO_CONFIGS.items():
        file.write_text(json.dumps(driver.config_to_dict(config)))
        assert driver.quantization_arguments(str(file)) == driver.quantization_arguments(name)


def test_compiled_code_with_fp8_weights_can_be_stored():
    """vLLM moves the inputs of what it stores to the meta device; `tests/bench_startup.py` shows what that
    saves.
    """
    rlhf_utils.patch_libraries()
    weight = Float8Tensor.from_hp(torch.randn(32, 64, dtype=torch.bfloat16), granularity=PerRow())
    empty = torch.empty_like(weight, device="meta", pin_memory=False)
    assert isinstance(empty, Float8Tensor) and empty.qdata.is_meta and empty.scale.is_meta
    assert (empty.shape, empty.dtype, empty.block_size) == (weight.shape, weight.dtype, weight.block_size)


# ----- Prompts ----------------------------------------------------------------------------------------------


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """It puts a BOS before every text, and so does its template."""
    tokenizer = byte_tokenizer()
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = bos
    turns = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    tokenizer.chat_template = "<s>" + turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    return tokenizer


def test_a_line_of_a_prompts_file_is_what_ends_with_a_newline(tmp_path):
    file, tokenizer = tmp_path / "prompts.txt", byte_tokenizer()
    file.write_bytes("\ufeffa\u2028b\x0cc\r\n\nd\x85e".encode())
    prompts = driver.read_prompts("--prompts-file", file, tokenizer)
    assert [(prompt.source, prompt.text, prompt.columns) for prompt in prompts] == [
        ("a\u2028b\x0cc", "a\u2028b\x0cc", {}),
        ("d\x85e", "d\x85e", {}),
    ]
    assert [prompt.token_ids for prompt in prompts] == tokenizer(["a\u2028b\x0cc", "d\x85e"]).input_ids


def test_json_lines(tmp_path):
    """Texts with line breaks and lists of messages; other columns, of any kind, are the reward's."""
    file, tokenizer = tmp_path / "prompts.jsonl", chat_tokenizer()
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 =\n"}]
    begun = [*question, {"role": "assistant", "content": "It is"}]
    rows = [
        {"prompt": "one\u2028line\nand another", "answer": "2", "tags": ["a", "b"]},
        {"prompt": question, "answer": 2, "tags": None},
        {"tags": {}, "answer": 0.5, "prompt": begun},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(("\ufeff" + "\r\n\n".join(lines)).encode())
    prompts = driver.read_prompts("--prompts-file", file, tokenizer)
    assert [{"prompt": prompt.source} | prompt.columns for prompt in prompts] == rows
    text = "[system]Be brief.[user]1 + 1 =\n[assistant]"
    assert [prompt.text for prompt in prompts] == [rows[0]["prompt"], f"<s>{text}", f"<s>{text}It is"]
    for prompt, expected in zip(prompts, [rows[0]["prompt"], text, f"{text}It is"], strict=True):
        assert prompt.token_ids == [1, *byte_tokenizer()(expected).input_ids], "one BOS"


def checked(folder, **flags) -> tuple:
    """As `main` looks at its flags, on a machine without a GPU."""
    config, device = driver.resolve(driver.Config(output_dir=folder / "out", **flags), 0)
    return driver.check(config, device)


def test_the_engine_has_room_for_the_longest(tmp_path):
    """Of prompts and held-out ones, and what follows; more may be asked for."""
    prompts, held_out = tmp_path / "prompts.txt", tmp_path / "held_out.txt"
    prompts.write_text("x" * 30 + "\nshort\n")
    held_out.write_text("short\n" + "x" * 40)
    flags = dict(prompts_file=prompts, max_tokens=7)
    for more, length in (
        ({}, 37),
        (dict(held_out_file=held_out), 47),
        (dict(engine_args='{"max_model_len": 99}'), 99),
        (dict(engine_args='{"max_num_seqs": 8}', tensor_parallel_size=1), 37),
    ):
        config, read, read_held_out, _, first = checked(tmp_path, **flags | more)
        arguments = driver.engine_arguments(config, "cpu")
        assert arguments["max_model_len"] == length and first == 0
        assert arguments.get("max_num_seqs", 8) == 8 and arguments["model"] == str(driver.TINY)
        assert [len(prompt.token_ids) for prompt in read] == [30, 5]
        assert [len(prompt.token_ids) for prompt in read_held_out] == [5, 40] * ("held_out_file" in more)


def test_without_a_file_vllms_examples_are_asked(tmp_path):
    _, prompts, held_out, _, _ = checked(tmp_path, model=write_config(tmp_path / "model", "tiny-opt"))
    assert [prompt.source for prompt in prompts] == driver.PROMPTS and held_out == []


def test_each_prompt_has_its_turn_and_each_sample_its_seed():
    """Also with several engines; vLLM counts on from a prompt's seed for its samples."""
    config = driver.Config(prompts_per_step=3, samples_per_prompt=4, max_tokens=5, temperature=0.7)
    prompts = [driver.Prompt(str(i), {}, [i], str(i)) for i in range(5)]
    calls = []
    engine = SimpleNamespace(rollout=SimpleNamespace(remote=lambda *args: calls.append(args)))
    for step in range(3):
        batch = driver.prompts_of_step(config, prompts, step)
        assert [prompt.source for prompt in batch] == [str((3 * step + i) % 5) for i in range(3)]
        assert len(driver.ask([engine, engine], batch, config, step)) == 2
    assert [len(asked) for asked, _ in calls] == [2, 1] * 3
    params = [driver.vllm.SamplingParams(**each) for _, settings in calls for each in settings]
    seeds = [each.seed + i for each in params for i in range(each.n)]
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 4
    assert {(each.temperature, each.max_tokens, each.logprobs) for each in params} == {(0.7, 5, 0)}
    calls.clear()
    driver.ask([engine] * 4, prompts, config, greedy=True)  # two each; none is left for the last
    assert [len(asked) for asked, _ in calls] == [2, 2, 1]
    assert {(each["n"], each["temperature"]) for _, settings in calls for each in settings} == {(1, 0)}


def test_rollouts_of_all_engines_come_in_order(monkeypatch):
    """With the seconds of the slowest engine, and the oldest weights."""
    monkeypatch.setattr(driver, "wait", lambda asked, *_: asked)
    rollouts = [driver.Rollout([3], [i], [-1.0]) for i in range(3)]
    asked = [(rollouts[:2], 1.5, 7), (rollouts[2:], 0.5, 8)]
    assert driver.take_in(asked, driver.Config()) == (rollouts, 1.5, 7)
