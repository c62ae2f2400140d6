"""Bad input: one message that says what was found, what was expected and what to type; most of it without an
engine.
"""

import collections
import dataclasses
import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import time
import typing
from pathlib import Path
from unittest import mock

import pytest
import ray
import torch
import transformers
import tyro

from harness import driver
from random_models import SHAPES, build_random_model, tokenizer_of

CONFIG = driver.Config(
    trainer_device="cpu", learning_rate=1e-3, epochs=1, quantization="fp8-weight-only", reward="letters"
)


def refused(function, *args, error=ValueError) -> str:
    """The message of the error that a call has to raise."""
    with pytest.raises(error) as caught:
        function(*args)
    return str(caught.value)


# ----- Flags ------------------------------------------------------------------------------------------------

COUNT, SHARE = (1, math.inf), (0.0, 1.0)
# Smallest and largest value of every flag that is a number.
RANGES = {
    "tensor_parallel_size": COUNT,
    "num_engines": COUNT,
    "steps": (0, math.inf),
    "prompts_per_step": COUNT,
    "samples_per_prompt": (2, math.inf),  # advantages compare different answers to one prompt
    "max_tokens": COUNT,
    "temperature": (0.01, 100.0),
    "learning_rate": SHARE,
    "epochs": COUNT,
    "kl_coef": (0.0, 1000.0),
    "tokens_per_microbatch": COUNT,
    "save_every": (0, math.inf),
    "seed": (0, 2**31 - 1),
    "timeout_s": (1.0, 1e6),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range(name):
    """By the types: also of what a program sets, that starts the driver's `main`."""
    low, high = RANGES[name]
    whole = isinstance(low, int)
    step = 1 if whole else 1e-3
    outside = [low - step, -math.inf, math.nan, math.inf, "three", "", *[low + 0.5] * whole]
    inside = [low, low + step, *[high] * math.isfinite(high)]
    outside += [high + step, 10 * high] * math.isfinite(high)
    for value in outside:
        message = refused(lambda value=value: driver.Config(**{name: value}))
        assert "1 validation error for Config" in message and name in message
        refused(lambda value=value: dataclasses.replace(CONFIG, **{name: value}))
    for value in inside:
        assert getattr(driver.Config(**{name: value}), name) == value


def test_every_number_has_a_range():
    kinds = typing.get_type_hints(driver.Config).items()
    assert {name for name, kind in kinds if kind in (int, float, int | None, float | None)} == set(RANGES)


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer-dtype", "float16"],
        ["--steps", "three"],
        ["--steps", "-1"],
        ["--samples-per-prompt", "1"],
        ["--learning-rate", ""],
        ["--learning-rate", "nan"],
        ["--nosuch", "1"],
    ],
)
def test_wrong_kinds(flags, capsys):
    """By tyro, in one box, before anything else."""
    with pytest.raises(SystemExit) as end:
        tyro.cli(driver.Config, args=flags)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in printed and printed.count("--help") == 1
    assert flags[0] in printed or flags[0].strip("-").replace("-", "_") in printed


@pytest.fixture
def nothing_starts(monkeypatch, tmp_path):
    """In an empty folder: a test fails if the program would start its processes."""
    monkeypatch.setattr(driver, "connect", lambda *_: pytest.fail("it would have started"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("flags", "expected", "found"),
    [
        (dict(max_tokens=512), "at most the 512 that the model has positions for", "a prompt of 19 tokens"),
        (dict(engine_args='{"max_model_len": 50}'), "prompts and --max-tokens need 51", "max_model_len 50"),
        (dict(resume="nowhere"), "nowhere: expected checkpoint-N of a run", "FileNotFoundError: "),
        (dict(track="wandb"), "--track wandb: not installed here; pip install wandb", ""),
        (
            dict(reward="nosuch"),
            "--reward nosuch: expected backwards, letters, or",
            "No module named 'nosuch'",
        ),
        (dict(reward="math:pi"), "--reward math:pi: expected backwards, letters, or", "3.14159"),
        (dict(reward="math:sin"), "--reward math:sin: expected a function of some of answer, compl", "'x'"),
        (
            dict(quantization="nosuch"),
            "--quantization nosuch: expected fp8-dynamic, fp8-weight-only, fp8_per_channel, fp8_per_block,",
            "FileNotFoundError",
        ),
        (dict(quantization="fp8_per_block"), "fp8_per_block: on GPUs only; ", "type fp8-weight-only"),
        (dict(prompts_file="/"), "--prompts-file /: expected UTF-8 text, ", "IsADirectoryError"),
        (dict(held_out_file="/no"), "--held-out-file /no: expected UTF-8 text, ", "FileNotFoundError"),
        (dict(output_dir="/dev/null"), "--output-dir /dev/null: expected a folder that can be", "FileExists"),
        (dict(output_dir="/proc/x"), "--output-dir /proc/x: expected a folder that can be", "FileNotFound"),
        (dict(engine_args="{"), "--engine-args {: expected a JSON object", "JSONDecodeError: "),
        (dict(engine_args="[1]"), "--engine-args [1]: expected a JSON object", "TypeError: "),
        (dict(engine_args='{"max_num_seqz": 1}'), ": expected a JSON object", "'max_num_seqz'"),
        (dict(engine_args='{"dtype": "half"}'), 'such as \'{"kv_cache_dtype": "fp8"}\'', "ValueError: dtype"),
        (dict(engine_args='{"model": "m", "seed": 3}'), "that the program does not set", "ValueError: model"),
        (
            dict(engine_args='{"pipeline_parallel_size": 2}'),
            "does not set",
            "ValueError: pipeline_parallel_s",
        ),
        (dict(engine_args='{"data_parallel_size": 2}'), "does not set", "ValueError: data_parallel_size"),
        (dict(engine_args='{"trust_remote_code": true}'), "does not set", "ValueError: trust_remote_code"),
        (
            dict(engine_args='{"quantization": "fp8"}', quantization="none"),
            "expected a JSON object",
            "ValueError: quantization",
        ),
        (
            dict(engine_args='{"quantization_config": {}}'),
            "expected a JSON object",
            "ValueError: quantization_config",
        ),
    ],
)
def test_bad_flags_are_seen_before_anything_starts(flags, expected, found, capsys, nothing_starts):
    with pytest.raises(SystemExit) as end:
        driver.main(driver.Config(**flags))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in printed
    assert printed.startswith("FAILED: ") and len(printed.splitlines()) == 1
    assert expected in printed and found in printed


def test_a_cluster_with_too_few_cpus(monkeypatch, capsys):
    """Known as soon as it answers."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(SystemExit):
        driver.main(driver.Config(ray_address="auto"))
    assert "the Ray cluster has 2 CPUs; trainer and engines need 3" in capsys.readouterr().err


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_gpus_that_know_no_fp8(monkeypatch, major, minor):
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    found = DeviceCapability(major, minor)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_, **__: found)
    if (major, minor) < (8, 9):
        message = refused(driver.resolve, driver.Config(), 3)
        assert message == f"GPU capability {major}.{minor}; FP8 needs 8.9: --quantization none"
        assert driver.resolve(driver.Config(quantization="none"), 3)[1] == "cuda"
    else:
        assert driver.resolve(driver.Config(), 3)[0].quantization == "fp8-dynamic"


def test_paths_may_begin_at_home(tmp_path, monkeypatch, path):
    """As in `--model=~/mine`, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(path, tmp_path / "mine")
    (tmp_path / "prompts").write_text("a\n")
    own = dict(model="~/mine", prompts_file="~/prompts", held_out_file="~/prompts", resume="~/checkpoint-1")
    config, _ = driver.resolve(driver.Config(**own, output_dir="~/out"), 0)
    for name, where in (own | {"output_dir": "~/out"}).items():
        assert str(getattr(config, name)) == where.replace("~", str(tmp_path))
    driver.check(dataclasses.replace(config, resume=None), "cpu")


def test_engine_args_reach_vllm():
    more = '{"kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.3, "enforce_eager": false}'
    config = dataclasses.replace(CONFIG, engine_args=more, quantization="none")
    assert json.loads(more).items() <= driver.engine_arguments(config, "cpu").items()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.0.0.1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:x"]
)
def test_a_cluster_that_is_not_there(address, capsys):
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        driver.main(driver.Config(ray_address=address))
    assert (
        end.value.code == 1
        and f"FAILED: --ray-address {address}: expected auto, or HOST:PORT" in capsys.readouterr().err
    )
    assert time.monotonic() - began < 10


def test_a_cluster_that_refuses_says_what_it_may_want(monkeypatch, capsys):
    """Ray shows the token in ~/.ray to a cluster that it finds, not to one whose address it is given."""

    def init(address, **_):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as cluster, pytest.raises(SystemExit) as end:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        driver.main(driver.Config(ray_address=address))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and printed.startswith(f"FAILED: --ray-address {address}: expected auto, or")
    assert "RAY_AUTH_MODE=token" in printed and "ConnectionError: Failed to connect to Ray cl" in printed


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    """The first one, or a termination; a second ends at once."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(os, "_exit", lambda code: handlers.update(code=code))
    with pytest.raises(SystemExit) as end, driver.one_message():
        driver.stop(signal.SIGTERM, None)
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert handlers["code"] == 130 and handlers[signal.SIGTERM] == signal.SIG_IGN
    assert end.value.code == 130 and capsys.readouterr().err == "FAILED: interrupted\n"


# ----- Prompts ----------------------------------------------------------------------------------------------

ROW = b'{"prompt": "a", "answer": 1}\n'


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "FileNotFoundError"),
        (b"\xff\xfe\xfa", "UnicodeDecodeError"),
        (b"", "no line with text"),
        (b"\n \r\n", "no line with text"),
        (b"{a question in braces}", "line 1: .*JSONDecodeError"),
        (ROW + b"\nb", "line 3: .*JSONDecodeError"),
        (ROW + b'{"prompt": "b"', "line 2: .*JSONDecodeError"),
        (ROW + b'{"answer": 1}', "line 2: .*KeyError: 'prompt'"),
        (ROW + b"5", "line 2: .*TypeError"),
        (ROW + b'["prompt"]', "line 2: .*TypeError"),
        (b'[{"prompt": "b"}]', "line 1: .*TypeError"),
        (b'[\n  {"prompt": "b"}\n]', "line 1: .*JSONDecodeError"),
        (ROW + b'{"prompt": "b"}', r"line 2: .*columns \[\], not \['answer'\]"),
        (ROW + b'{"prompt": "b", "answer": 1, "level": 2}', r"line 2: .*columns \['answer', 'level'\], not"),
        (b'{"prompt": ""}', "line 1: .*neither text nor a list of messages"),
        (b'{"prompt": 5}', "line 1: .*5, neither text nor a list of messages"),
        (b'{"prompt": []}', "line 1: .*neither text nor a list of messages"),
        (b'{"prompt": ["b"]}', "line 1: .*neither text nor a list of messages"),
        (b'{"prompt": {"role": "user", "content": "b"}}', "line 1: .*neither text nor a list of messages"),
        (b'{"prompt": [{"role": "user", "content": "b"}]}', "line 1: .*chat.template"),  # it has none
    ],
)
def test_bad_prompts_file(tmp_path, content, found):
    """A line is named by its number."""
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    message = refused(driver.read_prompts, "--prompts-file", file, tokenizer_of(259))
    assert message.startswith(f"--prompts-file {file}: expected UTF-8 text, ")
    assert re.search(f"Found: .*{found}", message)


def checked(folder: Path, **flags) -> tuple:
    """As `main` looks at its flags, on a machine without a GPU."""
    config, device = driver.resolve(driver.Config(output_dir=folder / "out", **flags), 0)
    return driver.check(config, device)


def test_a_column_that_the_held_out_prompts_lack(tmp_path):
    """What the reward cannot do without is missed before anything starts, in whichever file."""
    files = [tmp_path / "prompts", tmp_path / "held_out"]
    flags = dict(prompts_file=files[0], held_out_file=files[1], reward="backwards")
    for lacking in files:
        for file in files:
            file.write_bytes(b'{"prompt": "a"}' if file == lacking else ROW)
        message = refused(lambda: checked(tmp_path, **flags))
        assert "'answer'" in message and "\n" not in message
    lacking.write_bytes(ROW)
    checked(tmp_path, **flags)


def test_a_column_that_a_reward_may_lack_is_not_lost(tmp_path):
    """With `answer=None`, as many of TRL's rewards have it, all answers would be wrong without a word."""
    files = [tmp_path / "prompts", tmp_path / "held_out"]
    files[0].write_bytes(ROW)
    files[1].write_bytes(b'{"prompt": "a"}')
    flags = dict(prompts_file=files[0], held_out_file=files[1], reward=f"{__name__}:may_lack")
    assert "answer" in refused(lambda: checked(tmp_path, **flags))


def with_tokens(path: str, folder: Path, tokens: list[str], template: str) -> str:
    """A copy of a model whose tokenizer knows more than it has embeddings for; returns the folder."""
    shutil.copytree(path, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("flag", ["prompts_file", "held_out_file"])
def test_prompts_that_the_model_cannot_read(tmp_path, path, flag):
    """On a GPU a token without an embedding is an assertion of the device, behind which nothing is saved."""
    folder = with_tokens(path, tmp_path / "model", ["<new>"], "{{ messages[0].content }}")
    lines = [{"prompt": "all well"}, {"prompt": "see <new> there"}]
    for rows, message in (
        (lines, "prompt 'see <new> there': found token 259; embeddings have 259 rows"),
        (
            [lines[0], {"prompt": [{"role": "user", "content": ""}]}],
            "prompt '': found token None; embeddings have 259 rows",
        ),
    ):
        (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
        assert refused(lambda: checked(tmp_path, model=folder, **{flag: tmp_path / "rows"})) == message
    (tmp_path / "rows").write_text(json.dumps(lines[0]))
    checked(tmp_path, model=folder, **{flag: tmp_path / "rows"})


# ----- Models -----------------------------------------------------------------------------------------------


def in_config(**more):
    """What puts more into a folder's config.json."""

    def write(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return write


def beside(name: str, content: str = "{}"):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (in_config(quantization_config={"quant_method": "fp8"}), "quantization_config: give the BF16 model"),
        (
            in_config(quantization_config={"quant_method": "bitsandbytes"}),
            "quantization_config: give the BF1",
        ),
        (in_config(compression_config={"format": "x"}), "compression_config: give the BF16 model"),
        (beside("hf_quant_config.json"), "hf_quant_config.json: give the BF16 model"),
        (beside("quantize_config.json"), "quantize_config.json: give the BF16 model"),
        (beside("adapter_config.json"), "adapter_config.json: give the BF16 model, adapters merged"),
        (
            lambda folder: transformers.Qwen2_5_VLConfig().save_pretrained(folder),
            "a model of type qwen2_5_vl",
        ),
        (lambda folder: transformers.Gemma3Config().save_pretrained(folder), "a model of type gemma3"),
        (lambda folder: transformers.T5Config().save_pretrained(folder), "a model of type t5"),
        (lambda folder: transformers.BartConfig().save_pretrained(folder), "a model of type bart"),
        (lambda folder: transformers.BertConfig().save_pretrained(folder), None),  # it has a decoder's form
    ],
)
def test_models_that_one_end_alone_takes(path, tmp_path, change, found):
    """In one line, before the start."""
    change(Path(folder := shutil.copytree(path, tmp_path / "model")))
    if found:
        message = refused(lambda: checked(tmp_path, model=str(folder)))
        assert message.startswith(f"--model {folder}: expected a language model of text alone, not quantized")
        assert found in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "change",
    [
        in_config(_attn_implementation="flash_attention_2"),
        in_config(attn_implementation="flash_attention_3"),
        in_config(_attn_implementation="kernels-community/flash-attn"),
        in_config(pad_token_id=259),
        in_config(pad_token_id=100_000),
        in_config(pad_token_id=None),
        beside("generation_config.json", '{"num_beams": 1, "early_stopping": true, "temperature": 0.5}'),
        beside("generation_config.json", '{"pad_token_id": 100000, "cache_implementation": "static"}'),
    ],
)
def test_what_neither_end_uses_is_no_reason_to_fail(path, tmp_path, change):
    change(Path(folder := shutil.copytree(path, tmp_path / "model")))
    checked(tmp_path, model=str(folder))
    trainer = trainer_of(folder)
    trainer.train_step([ROLLOUT])
    _, checkpoint = trainer.save_checkpoint(tmp_path)
    again = trainer_of(folder, resume=checkpoint)
    assert same([*trainer.model.parameters()], [*again.model.parameters()])
    assert checked(tmp_path / "later", model=str(folder), resume=checkpoint)[-1] == 1


def model(folder, config: transformers.PretrainedConfig) -> str:
    """A random model with a tokenizer; returns the folder."""
    torch.manual_seed(0)
    random = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in random.parameters():  # large ones, so that a cap on attention scores acts
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    random.save_pretrained(folder)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    return str(folder)


SMALL = dict(
    vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
SMALL |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2 = transformers.GPT2Config(
    vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=256, eos_token_id=2
)
GEMMA = transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=0.05)
ROLLOUT = driver.Rollout([5, 6, 7], [8, 9, 10, 11], [-5.0] * 4, advantage=1.0)


def trainer_of(path: str | Path, **settings) -> driver.Trainer:
    return driver.Trainer(dataclasses.replace(CONFIG, model=str(path), **settings))


@pytest.mark.parametrize("config", [GPT2, GEMMA], ids=["dropout", "caps"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_computes_what_the_engine_does(tmp_path, config, checkpointing):
    """No dropout, whatever a config calls it, and with caps, which some ways of attention leave out."""
    path = model(tmp_path, config)
    trainer = trainer_of(path, gradient_checkpointing=checkpointing, temperature=0.7)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    batch = trainer._pad([ROLLOUT, ROLLOUT])
    expected = driver.completion_logprobs(plain, batch, 0.7)
    torch.testing.assert_close(driver.completion_logprobs(trainer.model, batch, 0.7), expected)
    assert not trainer.model.training


def test_a_model_that_cannot_compute_activations_again(path, monkeypatch):
    monkeypatch.setattr(driver, "GradientCheckpointingLayer", int)
    assert "OPTForCausalLM has no layers" in (message := refused(trainer_of, path))
    assert message.endswith("type --no-gradient-checkpointing")
    trainer_of(path, gradient_checkpointing=False)


PHI = dict(**SMALL, num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64)
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "longest", "message"),
    [
        (GPT2, 257, "found a prompt of 225 tokens with --max-tokens 32; expected at most the 256 that the"),
        (transformers.Phi3Config(**PHI, rope_scaling=LONG), 65, "expected at most the 64 that the model has"),
        (
            transformers.LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            1,
            "found dynamic RoPE scaling, which trainer and engine compute differently",
        ),
    ],
    ids=["positions", "longrope", "dynamic"],
)
def test_models_that_do_not_fit(config, longest, message):
    assert message in refused(driver.check_model, CONFIG, config, longest, "cuda")


def test_models_that_fit():
    scaled = transformers.LlamaConfig(**SMALL, rope_scaling={"rope_type": "linear", "factor": 9.0})
    for config, longest in (
        (GPT2, 256),
        (transformers.Phi3Config(**PHI, rope_scaling=LONG), 64),
        (transformers.Gemma3TextConfig(**SMALL, head_dim=16, num_key_value_heads=2), 2048),
        (scaled, 9 * 2048),
    ):
        driver.check_model(CONFIG, config, longest, "cuda")


@pytest.mark.parametrize(
    ("shape", "scheme"), [("small-qwen3-moe", "fp8_per_channel"), ("tiny-llama", "fp8_per_block")]
)
def test_schemes_that_vllm_has_on_gpus_only(shape, scheme):
    settings = dataclasses.replace(CONFIG, quantization=scheme)
    message = refused(driver.check_model, settings, SHAPES[shape], 40, "cpu")
    assert message == f"--quantization {scheme}: on GPUs only; type fp8-weight-only instead"
    driver.check_model(settings, SHAPES[shape], 40, "cuda")
    driver.check_model(CONFIG, SHAPES[shape], 40, "cpu")
    dense = dataclasses.replace(CONFIG, quantization="fp8_per_channel")
    driver.check_model(dense, SHAPES["tiny-llama"], 40, "cpu")


def test_a_model_without_a_tokenizer(path, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(path, name), tmp_path)
    message = refused(lambda: checked(tmp_path, model=str(tmp_path)))
    assert message.startswith(f"--model {tmp_path}: expected a language model of text alone")


def test_unknown_model(tmp_path, monkeypatch):
    # No retries where there is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in ("no-such/model", str(tmp_path / "empty"), "not a name"):
        message = refused(lambda name=name: checked(tmp_path, model=name))
        assert message.startswith(f"--model {name}: expected a language model of text alone")


def test_the_program_without_the_tiny_model(tmp_path, monkeypatch, path):
    """From the two files alone: what is missing is said, any other model runs."""
    monkeypatch.setattr(driver, "TINY", tmp_path / "tests" / "tiny")
    assert f"--model {driver.TINY}: expected a language model" in refused(lambda: checked(tmp_path))
    checked(tmp_path, model=path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_model_runs(path, tmp_path, name, monkeypatch):
    """Nor does anyone ask whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    folder, ran = shutil.copytree(path, tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    own = {"model_type": "own", "tokenizer_class": "Own"}
    own["auto_map"] = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    if name == "config.json":
        assert "expected a language model of" in refused(lambda: checked(tmp_path, model=str(folder)))
    else:  # transformers knows the tokenizer of an OPT
        checked(tmp_path, model=str(folder))
    assert not ran.exists()


# ----- Rewards ----------------------------------------------------------------------------------------------


PROMPT = driver.Prompt("p", {"answer": "a"}, [3], "p")
ANSWERS = [driver.Rollout([3], [4, 2], [-1.0, -1.0], text) for text in "ab"]


def alarm(**_):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def leave(**_):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda **_: [1.0], "expected 2 finite numbers"),
        (lambda **_: [1.0] * 3, "found 3 numbers"),
        (lambda **_: [1.0, math.nan], "not finite: [\"nan for 'b'\"]"),
        (lambda **_: [1e39, 1.0], "not finite: [\"1e+39 for 'a'\"]"),
        (lambda **_: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda **_: [None, 1.0], "failed: TypeError"),
        (lambda **_: 1.0, "failed: TypeError"),
        (lambda **_: {0: 1.0, 1: 0.5}, "it returned a dict"),
        (lambda **_: {0.5, 1.0}, "it returned a set"),
        (lambda **_: "10", "it returned a str"),
        (lambda **_: b"10", "it returned a bytes"),
        (lambda **_: bytearray(2), "it returned a bytearray, not a list of numbers"),
        (lambda **_: collections.UserDict({0: 1.0, 1: 0.5}), "it returned a UserDict"),
        (lambda **_: {0: 1.0, 1: 0.5}.keys(), "it returned a dict_keys"),
        (lambda **_: ["1", "0"], "failed: TypeError: can only concatenate str"),
        (lambda **_: later([], []), "failed: TypeError: 'coroutine' object is not iterable"),
        (leave, "failed: SystemExit: 3"),
        (alarm, "failed: ValueError: signal only works in main thread of the main interpreter"),
    ],
)
def test_a_broken_reward_is_never_a_zero(reward, message):
    assert message in refused(driver.compute_rewards, [PROMPT], ANSWERS, reward, error=RuntimeError)


def test_a_reward_may_change_what_it_gets():
    """The next one gets it as it is in the file."""
    prompt = driver.Prompt([{"role": "user", "content": "p"}], {"answer": ["a"]}, [3], "p")
    seen = []

    def reward(prompts, answer, completion_ids, **_):
        seen.append(json.dumps([prompts, answer, completion_ids]))
        for each in (*prompts, *answer, *completion_ids):
            each.clear()
        return [1.0, 0.0]

    for _ in range(2):
        driver.compute_rewards([prompt], ANSWERS, reward)
    assert seen[0] == seen[1] and prompt.source and ANSWERS[0].completion


def test_a_reward_that_fails_says_where():
    message = refused(driver.compute_rewards, [PROMPT], ANSWERS, lambda **_: [][0], error=RuntimeError)
    assert f"IndexError: list index out of range <FrameSummary file {__file__}, line " in message


def test_a_reward_function_that_hangs_ends_in_time():
    def sleep_for_ever(**_):
        time.sleep(3600)

    message = refused(driver.compute_rewards, [PROMPT], ANSWERS, sleep_for_ever, 0.5, error=TimeoutError)
    assert message == "the reward function has not returned for 0.5 s, the --timeout-s"


def may_lack(completions, answer=None, **kwargs): ...


def wants_more(prompts, completions, solution): ...


def by_position(prompts, completions, /): ...


async def later(prompts, completions): ...


class Judge:
    def __init__(self, completions): ...


class Awaited:
    async def __call__(self, completions): ...


awaited, part_of_later, method = Awaited(), functools.partial(later, prompts=[]), Awaited().__call__


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("wants_more", "'solution'"),
        ("by_position", "positional"),
        ("later", "not a plain function"),
        ("Judge", "not a plain function"),
        ("awaited", "not a plain function"),
        ("part_of_later", "not a plain function"),
        ("method", "not a plain function"),
        ("CONFIG", "is not a callable object"),
    ],
)
def test_rewards_that_cannot_be_called_by_name(name, found):
    name = f"{__name__}:{name}"
    message = refused(driver.load_reward, name, {"answer"})
    assert message.startswith(f"--reward {name}: expected ") and found in message and "\n" not in message


def test_a_column_that_the_program_fills_is_refused():
    """It would be overwritten, and the reward would get other values than the file has."""
    message = refused(driver.load_reward, "letters", {"answer", "completions", "prompts"})
    assert "['completions', 'prompts']" in message and "rename" in message and "\n" not in message


def test_a_reward_module_may_fail_in_any_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(("1 / 0", "import nosuch", "def f(:", "raise SystemError", "exit(3)")):
        Path(f"broken_{number}.py").write_text(code)
        message = refused(driver.load_reward, f"broken_{number}:f", set())
        assert message.startswith(
            f"--reward broken_{number}:f: expected backwards, letters, or module:function"
        )


# ----- Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.7, 10.1, 1e30, -3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_no_advantage(value, dtype):
    assert (driver.compute_advantages(torch.full((2, 16), value, dtype=dtype)) == 0).all()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_random_model(tmp_path_factory.mktemp("bad"))


def state(trainer) -> list:
    """Everything that a step changes."""
    optimizer = [t.clone() for kept in trainer.optimizer.state.values() for t in kept.values()]
    return [*(p.detach().clone() for p in trainer.model.parameters()), *optimizer]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def test_without_advantages_nothing_is_learned(path):
    trainer = trainer_of(path)
    before = [p.clone() for p in trainer.model.parameters()]
    metrics = trainer.train_step([dataclasses.replace(ROLLOUT, advantage=0.0)])
    assert same(before, list(trainer.model.parameters()))
    assert metrics["grad_norm"] == 0


def test_a_gradient_that_is_not_finite_changes_nothing(path):
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    before = state(trainer)
    broken = dataclasses.replace(ROLLOUT, advantage=math.inf)
    assert "non-finite" in refused(trainer.train_step, [broken], error=RuntimeError)
    assert same(before, state(trainer)) and trainer.step == 1
    trainer.train_step([ROLLOUT])
    assert all(tensor.isfinite().all() for tensor in state(trainer))


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_log_probabilities_that_are_not_finite_stop_the_step(wrong, monkeypatch):
    monkeypatch.setattr(driver, "wait", lambda asked, *_: asked)
    rollouts = [driver.Rollout([3], [4, 5], logprobs) for logprobs in ([-1.0, wrong], [-1.0, -1.0])]
    shares = [(rollouts, 1.0, 1), (rollouts[:1], 1.0, 1)]
    message = refused(driver.take_in, shares, CONFIG, error=RuntimeError)
    assert "log-probabilities of 2 of 3 completions are not finite" in message


def test_what_is_masked_has_no_gradient():
    """However unlikely the policy finds the token after the end, and whatever the engine would have said."""
    logprobs_BT = torch.tensor([[-1.0, -120.0]], requires_grad=True)
    batch = {
        "old_BT": torch.tensor([[-1.0, -120.0]]),
        "engine_BT": torch.tensor([[-1.0, math.nan]]),
        "reference_BT": torch.tensor([[-1.0, -1.0]]),
        "advantages_B1": torch.tensor([[1.0]]),
        "mask_BT": torch.tensor([[True, False]]),
    }
    loss, _ = driver.compute_ppo_loss(logprobs_BT, batch, dataclasses.replace(CONFIG, kl_coef=0.1))
    [gradient] = torch.autograd.grad(loss, logprobs_BT)
    assert loss == -1 and gradient.tolist() == [[-1.0, 0.0]]


# ----- The trainer's GPU ------------------------------------------------------------------------------------


@pytest.fixture
def gpu_of(monkeypatch):
    """Give the trainer's GPU so many GiB."""

    def be(gib: float) -> None:
        monkeypatch.setattr(platform, "get_device_total_memory", lambda *_: int(gib * 2**30), raising=False)

    platform = type(driver.vllm.platforms.current_platform)
    return be


@pytest.mark.parametrize(
    ("gib", "shape", "kl_coef", "dtype"),
    [
        (79.1, "qwen3-0.6b", 0, "float32"),
        (79.1, "qwen3-4b", 0, "float32"),
        (79.1, "qwen3-4b", 0.1, "bfloat16"),  # with a reference
        (79.1, "qwen3-8b", 0, "bfloat16"),
        (44.5, "qwen3-8b", 0, None),
        (140.4, "qwen3-8b", 0, "bfloat16"),
        (139.8, "qwen3-30b-a3b", 0, None),
    ],
)
def test_the_trainers_dtype_follows_from_its_gpu(gpu_of, capsys, gib, shape, kl_coef, dtype):
    """17 bytes a parameter if they fit (16, and copies for products), or 6, or it is said what would fit."""
    gpu_of(gib)
    config = dataclasses.replace(CONFIG, trainer_device="cuda", kl_coef=kl_coef, model=shape)
    if dtype is None:
        message = refused(driver.choose_dtype, config, SHAPES[shape])
        assert f"the trainer's GPU has {gib:.0f}" in message and "at most " in message and "\n" not in message
        at_most = float(message.partition("at most ")[2].partition("B")[0])
        assert 0.7 * gib / 6 * 1.07 < at_most < gib / 6 * 1.07
    else:
        assert driver.choose_dtype(config, SHAPES[shape]) == dtype
        assert capsys.readouterr().out.endswith(
            f"; the trainer's GPU has {gib:.0f}: --trainer-dtype {dtype}\n"
        )


def test_activations_count_too(gpu_of):
    """All that are kept, and those of one long answer."""
    gpu_of(79.1)
    config = dataclasses.replace(
        CONFIG, trainer_device="cuda", model="qwen3-4b", gradient_checkpointing=False
    )
    assert driver.choose_dtype(config, SHAPES["qwen3-4b"]) == "bfloat16"
    config = dataclasses.replace(config, gradient_checkpointing=True, engine_args='{"max_model_len": 32768}')
    assert driver.choose_dtype(config, SHAPES["qwen3-4b"]) == "bfloat16"
    wide, usual = (transformers.Qwen3Config(intermediate_size=size) for size in (32768, 12288))
    assert driver.activation_bytes(config, wide, 3) > 1.4 * driver.activation_bytes(config, usual, 3)


def test_a_mismatch_that_is_no_number_is_no_good_news(path, monkeypatch, capsys):
    broken = dataclasses.replace(ROLLOUT, logprobs=[math.nan] * len(ROLLOUT.logprobs))
    scored = trainer_of(path).score([broken], dict(fp8=[], not_fp8=[], split=[]))
    for name, value in {"ask": [], "take_in": ([], 0, 0), "wait": [scored]}.items():
        monkeypatch.setattr(driver, name, lambda *_, value=value: value)
    found = driver.explain_mismatch(CONFIG, mock.MagicMock(), None, [], {})
    assert found.pop("mismatch_kl_not_seen") < 1e-3 and [*found.values()] == [None, None]
    assert "different functions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        {"quantization": "fp8_per_block"},
        {"quantization": "fp8_per_channel", "engine_args": '{"kv_cache_dtype": "fp8"}'},
        {"quantization": "own.json"},
    ],
)
def test_what_the_trainer_cannot_round_as_the_engine_is_not_claimed(path, flags):
    trainer = trainer_of(path)
    trainer.config = dataclasses.replace(trainer.config, **flags)
    assert "does not know how" in refused(trainer.score, [], {})


def test_a_dtype_that_is_given_or_none_is_known(gpu_of, monkeypatch):
    gpu_of(1)  # is not asked
    for given, device in (("bfloat16", "cuda"), ("float32", "cuda"), ("auto", "cpu")):
        config = dataclasses.replace(CONFIG, trainer_device=device, trainer_dtype=given)
        assert driver.choose_dtype(config, SHAPES["qwen3-8b"]) == given.replace("auto", "float32")

    monkeypatch.setattr(driver.shutil, "which", lambda _: None)
    message = refused(driver.choose_dtype, dataclasses.replace(CONFIG, trainer_dtype="bfloat16"), None)
    assert "install g++, or type float32" in message and "\n" not in message


def test_a_checkpoint_of_another_dtype_is_refused(path, saved, tmp_path):
    """Its moments are of another form; `auto` takes what it has."""
    flags = dict(model=str(path), resume=saved, reward="letters", trainer_device="cpu", steps=2)
    assert checked(tmp_path, **flags)[0].trainer_dtype == "float32"
    message = refused(lambda: checked(tmp_path, **flags, trainer_dtype="bfloat16"))
    assert "float32, not in --trainer-dtype bfloat16" in message and "\n" not in message


# ----- Files ------------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_flags(path, tmp_path):
    """The learning rate of the flag; metrics whose last line was cut off are read without it."""
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    step, folder = trainer.save_checkpoint(tmp_path)
    assert (step, folder) == (1, tmp_path / "checkpoint-1")
    own = torch.load(folder / "trainer.pt", weights_only=True)
    torch.save(own | {"random": {"cuda": torch.zeros(16, dtype=torch.uint8)}}, folder / "trainer.pt")
    resumed = trainer_of(path, resume=folder, learning_rate=7e-5)  # on another device
    assert resumed.step == 1 and [group["lr"] for group in resumed.optimizer.param_groups] == [7e-5]
    assert same(state(trainer), state(resumed))
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert driver.read_metrics(file) == [{"step": 0}, {"step": 1}]
    again = dataclasses.replace(CONFIG, model=path, output_dir=tmp_path, resume=folder, steps=3)
    assert driver.check(again, "cpu")[-1] == 1
    assert driver.engine_arguments(again, "cpu")["model"] == str(folder), "the trainer's weights"
    for line in ('{"st', "5", "[]", '{"a": 1}', '{"step": "x"}'):
        file.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
        assert "metrics.jsonl: expected a JSON object with a `step` a line" in refused(
            driver.check, again, "cpu"
        )
    file.write_bytes(b"\xff\n")
    assert "metrics.jsonl: expected a JSON object with a `step` a line" in refused(driver.check, again, "cpu")


@pytest.fixture(scope="module")
def saved(path, tmp_path_factory):
    """A checkpoint after one step."""
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    return trainer.save_checkpoint(tmp_path_factory.mktemp("saved"))[1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "trainer.pt").write_text("x"), "Found: RuntimeError: mmap"),
        (lambda folder: torch.save({"step": -3}, folder / "trainer.pt"), "Found: ValueError: step -3"),
        (lambda folder: torch.save({"step": 21}, folder / "trainer.pt"), "Found: ValueError: step 21"),
        (lambda folder: torch.save({"step": "one"}, folder / "trainer.pt"), "Found: ValueError: step 'one'"),
        (lambda folder: torch.save({}, folder / "trainer.pt"), "Found: KeyError: 'step'"),
    ],
)
def test_a_damaged_checkpoint_is_seen_before_anything_starts(path, saved, tmp_path, break_it, message):
    folder = shutil.copytree(saved, tmp_path / "checkpoint-1")
    flags = dict(model=path, resume=folder, steps=20)
    assert checked(tmp_path, **flags)[-1] == 1
    break_it(folder)
    found = refused(lambda: checked(tmp_path, **flags))
    assert found.startswith(f"--resume {folder}: expected checkpoint-N of a run with --model {path}, N at m")
    assert message in found


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (in_config(hidden_size=256), "hidden_size"),
        (in_config(num_attention_heads=8), "num_attention_heads"),
        (in_config(do_layer_norm_before=False), "do_layer_norm_before"),
        (lambda folder: transformers.LlamaConfig(**SMALL).save_pretrained(folder), "model_type"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(path, saved, tmp_path, change, name):
    change(Path(folder := shutil.copytree(path, tmp_path / "model")))
    message = refused(lambda: checked(tmp_path, model=str(folder), resume=saved))
    assert message.startswith(f"--resume {saved}: expected checkpoint-N of a run with --model {folder}, N at")
    assert "another model's; different are " in message and name in message and "\n" not in message


def test_rope_is_part_of_the_model(tmp_path):
    """Of two Llamas with the same shapes."""
    path = model(tmp_path / "model", transformers.LlamaConfig(**SMALL))
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    _, saved = trainer.save_checkpoint(tmp_path)
    assert checked(tmp_path / "a", model=path, resume=saved)[-1] == 1
    in_config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})(Path(path))
    assert "different are rope_parameters" in refused(
        lambda: checked(tmp_path / "b", model=path, resume=saved)
    )


def test_a_folder_with_another_run_is_refused(path, saved, tmp_path):
    """Without `--resume` from it, with what to type."""
    own = dict(model=path, output_dir=tmp_path)

    def check(**more) -> tuple:
        return driver.check(*driver.resolve(driver.Config(**own | more), 0))

    check()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    message = refused(check)
    assert message == f"--output-dir {tmp_path}: found another run in it; expected another folder"
    for number in (2, 10, 9):
        shutil.copytree(saved, tmp_path / f"checkpoint-{number}")
    assert refused(check) == f"{message}, or --resume {tmp_path}/checkpoint-10"
    assert refused(lambda: check(resume=saved)) == f"{message}, or --resume {tmp_path}/checkpoint-10"
    assert check(resume=tmp_path / "checkpoint-9")[-1] == 1
    check(output_dir=tmp_path / "other", resume=tmp_path / "checkpoint-9")


def test_two_runs_at_once_in_one_folder(path, tmp_path, nothing_starts, capsys):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        driver.main(driver.Config(model=path, output_dir=tmp_path))
    os.close(lock)
    found = f"FAILED: --output-dir {tmp_path}: expected a folder in which no other run is under way. Found: "
    assert capsys.readouterr().err.startswith(found)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_a_checkpoint_are_as_the_umask_says(path, tmp_path, umask):
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    before = os.umask(umask)
    try:
        _, folder = trainer.save_checkpoint(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "settings", [None, {"temperature": 0.6, "top_p": 0.95}, {"num_beams": 1, "early_stopping": True}]
)
def test_a_checkpoint_is_what_came_with_other_weights(path, tmp_path, settings):
    """Byte for byte, also what transformers would not save so; even if the model's folder has gone."""
    folder = tmp_path / "model"
    shutil.copytree(path, folder)
    (folder / "generation_config.json").unlink()
    if settings:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\r\n")
    (folder / "vocab.txt").write_bytes(b"\xff\x00")
    for name in ("preprocessor_config.json", "spiece.model", "tokenizer.model.v3", "qwen.tiktoken"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    contents = lambda folder: {
        f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }
    came = contents(folder)
    trainer = trainer_of(folder)
    shutil.rmtree(folder)
    trainer.train_step([ROLLOUT])
    _, checkpoint = trainer.save_checkpoint(tmp_path)
    saved = contents(checkpoint)
    assert saved.keys() == came.keys() | {Path("trainer.pt")}
    changed = {str(name) for name in came if saved[name] != came[name]}
    assert changed <= {"config.json", "model.safetensors"}
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert same([*trainer.model.parameters()], [*again.parameters()])
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("a").input_ids == tokenizer_of(259)("a").input_ids


def test_weights_that_hold_nan_are_named(path, tmp_path):
    broken = transformers.AutoModelForCausalLM.from_pretrained(path)
    broken.model.decoder.layers[0].fc1.weight.data[3, 3] = math.nan
    broken.save_pretrained(tmp_path)
    for file in Path(path).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    message = refused(trainer_of(tmp_path).prepare_weights)
    assert "1 weights hold NaN or infinity" in message and "model.decoder.layers.0.fc1.weight" in message


def test_metrics_are_json():
    row = {"a": math.nan, "b": 1.5, "c": "x", "d": -math.inf}
    assert json.loads(driver.to_json(row), parse_constant=pytest.fail) == {
        "a": None,
        "b": 1.5,
        "c": "x",
        "d": None,
    }


def test_a_plot_that_fails_is_no_reason_to_fail(tmp_path, monkeypatch, capsys):
    """It is a warning, and the rest is written."""

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(driver.Figure, "savefig", full)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5, "mismatch_kl": 0.1}\n')
    driver.report(dataclasses.replace(CONFIG, output_dir=tmp_path), {"held_out": {"reward": [0.1, 0.2]}})
    printed = capsys.readouterr()
    assert (
        printed.err
        == "Warning: drawing curves.png fails, the run goes on: OSError('No space left on device')\n"
    )
    assert "reward: 0.100 before" in printed.out and (tmp_path / "summary.json").exists()


def test_lines_that_nobody_reads_are_no_reason_to_fail(monkeypatch, capsys):
    """`... | head` closes the pipe of a run that goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as closed, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", closed)
        for _ in range(2):
            driver.tell("a step", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for what the file still holds
    os.close(writer)
    [warning] = capsys.readouterr().err.splitlines()
    assert warning == "Warning: printing fails, the run goes on: BrokenPipeError(32, 'Broken pipe')"


def test_half_a_step_is_not_saved(path, tmp_path):
    """With two epochs: when the second one fails, the weights are those of no step."""
    trainer = trainer_of(path, epochs=2)
    trainer.train_step([ROLLOUT])
    plain = trainer.optimizer.step

    def step():
        plain()
        trainer.model.forward = lambda **_: 1 / 0

    trainer.optimizer.step = step
    with pytest.raises(ZeroDivisionError):
        trainer.train_step([ROLLOUT])
    assert "a step has failed half way" in refused(trainer.save_checkpoint, tmp_path, error=RuntimeError)
    assert not list(tmp_path.iterdir())


def test_weights_with_nan_are_not_saved(path, tmp_path):
    trainer = trainer_of(path)
    trainer.train_step([ROLLOUT])
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = math.nan
    assert "1 weights hold NaN or infinity" in refused(trainer.save_checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())
