"""Bad input: one message that says what was found, what was expected and what to type; most of it without an
engine.
"""

import dataclasses
import functools
import inspect
import json
import math
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
import transformers
import tyro

from harness import driver
from random_models import build_random_model, tokenizer_of, write_config

CONFIG = driver.Config(trainer_device="cpu", learning_rate=1e-3, max_model_len=256, epochs=1)


def refused(function, *args, error=ValueError) -> str:
    """The message of the error that a call has to raise."""
    with pytest.raises(error) as caught:
        function(*args)
    return str(caught.value)


# ----- Flags ------------------------------------------------------------------------------------------------

LIMITS = {name: limits for names, limits in driver.LIMITS.items() for name in names}
OUTSIDE = [(name, low - 1, "low") for name, (low, _) in LIMITS.items()]
OUTSIDE += [(name, high * 2 + 1, "high") for name, (_, high) in LIMITS.items()]
OUTSIDE += [(name, math.nan, "NaN") for name, (low, _) in LIMITS.items() if isinstance(low, float)]


@pytest.mark.parametrize(("name", "value", "how"), OUTSIDE)
def test_numbers_out_of_range(name, value, how):
    message = refused(driver.check_flags, driver.Config(**{name: value}))
    low, high = LIMITS[name]
    assert message == f"--{name.replace('_', '-')}: expected {low:g} to {high:g}, found {value:g}"


def test_every_number_has_limits():
    kinds = (int, float, int | None, float | None)
    numbers = {field.name for field in dataclasses.fields(driver.Config) if field.type in kinds}
    assert numbers == set(LIMITS)


@pytest.mark.parametrize(
    "flags",
    [["--trainer-dtype", "float16"], ["--steps", "three"], ["--learning-rate", ""], ["--nosuch", "1"]],
)
def test_wrong_kinds(flags, capsys):
    """By tyro, before anything else."""
    with pytest.raises(SystemExit) as end:
        tyro.cli(driver.Config, args=flags)
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(max_tokens=512), "Found 32 prompts that leave no room for --max-tokens 512: prompt 1 has"),
        (dict(max_tokens=512), "shorten them, or type --max-tokens 493 --max-model-len 512"),
        (dict(max_model_len=1), "at most --max-model-len 1 in all; shorten them, or type --max-model-len 51"),
        (
            dict(resume=Path("nowhere")),
            "--resume nowhere: expected checkpoint-N of an earlier run. Found: FileNotFoundError: ",
        ),
        (dict(track="wandb"), "--track wandb: not installed here; pip install wandb"),
        (dict(reward="nosuch"), "--reward nosuch: expected backwards, letters, or"),
        (dict(reward="nosuch"), "Found: ModuleNotFoundError: No module named 'nosuch'"),
        (dict(reward="math:pi"), "--reward math:pi: expected backwards, letters, or"),
        (dict(reward="math:pi"), "Found: TypeError: a float, not a function"),
        (
            dict(quantization="nosuch"),
            "--quantization nosuch: expected fp8-dynamic, fp8-weight-only, fp8_per_channel, fp8_per_block,",
        ),
        (dict(prompts_file=Path("/")), "--prompts-file /: expected UTF-8 text, one prompt a line. Found:"),
        (
            dict(output_dir=Path("/dev/null")),
            "--output-dir /dev/null: expected a folder that can be written to",
        ),
        (dict(output_dir=Path("/proc/x")), "--output-dir /proc/x: expected a folder that can be written to"),
        (
            dict(engine_args="{"),
            "--engine-args {: expected a JSON object with keywords of vllm.LLM",
        ),
        (dict(engine_args="{"), 'such as \'{"kv_cache_dtype": "fp8"}\'. Found: JSONDecodeError: '),
        (dict(engine_args="[1]"), "--engine-args [1]: expected a JSON object"),
        (dict(engine_args="[1]"), "Found: TypeError: a list"),
        (dict(engine_args='{"max_num_seqz": 1}'), "Found: ValueError: max_num_seqz"),
        (dict(engine_args='{"dtype": "half"}'), "that the program does not set, such as"),
        (dict(engine_args='{"dtype": "half"}'), "Found: ValueError: dtype"),
        (dict(engine_args='{"quantization": "fp8"}', quantization="none"), "Found: ValueError: quantization"),
        (dict(engine_args='{"quantization_config": {}}'), "Found: ValueError: quantization_config"),
    ],
)
def test_bad_flags_are_seen_before_anything_starts(flags, message, capsys):
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        driver.main(driver.Config(**flags))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("FAILED: ")
    assert f"FAILED: {message}" in printed if message.startswith("--") else message in printed
    assert time.monotonic() - began < 5


def test_engine_args_reach_vllm():
    more = '{"kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.3}'
    arguments = driver.engine_arguments(
        dataclasses.replace(CONFIG, engine_args=more, quantization="none"), "m", "cpu"
    )
    assert arguments["kv_cache_dtype"] == "fp8" and arguments["gpu_memory_utilization"] == 0.3


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.0.0.1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:x"]
)
def test_a_cluster_that_is_not_there(address, capsys):
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        driver.main(driver.Config(ray_address=address))
    assert (
        end.value.code == 1
        and f"FAILED: --ray-address {address}: expected HOST:PORT" in capsys.readouterr().err
    )
    assert time.monotonic() - began < 10


def test_a_cluster_that_refuses_says_what_it_may_want(monkeypatch, capsys):
    """Ray shows the token in ~/.ray to a cluster that it finds, not to one whose address it is given."""

    def init(address, **_):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as cluster, pytest.raises(SystemExit) as end:
        driver.main(driver.Config(ray_address=f"127.0.0.1:{cluster.getsockname()[1]}"))
    printed = capsys.readouterr().err
    assert end.value.code == 1 and "FAILED: Failed to connect to Ray cluster\n" in printed
    assert "a token in ~/.ray, it asks for it: RAY_AUTH_MODE=token" in printed


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as end, driver.one_message():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "FAILED: interrupted\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "No such file"), (b"\xff\xfe\xfa", "UnicodeDecodeError|codec"), (b"\n\n", "no line with text")],
)
def test_bad_prompts_file(tmp_path, content, found):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompts-file {file}: expected UTF-8 text, .*({found})"):
        driver.check_flags(driver.Config(prompts_file=file, output_dir=tmp_path))


def test_a_line_of_a_prompts_file_is_what_ends_with_a_newline(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028b\x0cc\r\n\nd\x85e".encode())
    prompts, _ = driver.check_flags(driver.Config(prompts_file=file, output_dir=tmp_path))
    assert prompts == ["a\u2028b\x0cc", "d\x85e"]


# ----- Models -----------------------------------------------------------------------------------------------


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
ROLLOUT = {"prompt": [5, 6, 7], "completion": [8, 9, 10, 11], "logprobs": [-5.0] * 4, "advantage": 1.0}


@pytest.mark.parametrize("config", [GPT2, GEMMA], ids=["dropout", "caps"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_computes_what_the_engine_does(tmp_path, config, checkpointing):
    """No dropout, whatever a config calls it, and with caps, which some ways of attention leave out."""
    settings = dataclasses.replace(CONFIG, gradient_checkpointing=checkpointing, trainer_dtype="float32")
    path = model(tmp_path, config)
    trainer = driver.Trainer(settings, path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    batch = trainer._pad([ROLLOUT, ROLLOUT])
    expected = driver.completion_logprobs(plain, batch, settings.temperature)
    torch.testing.assert_close(trainer._logprobs(trainer.model, batch), expected)
    assert trainer.model.training == checkpointing


def test_a_model_that_cannot_compute_activations_again(path, monkeypatch):
    monkeypatch.setattr(transformers.OPTForCausalLM, "supports_gradient_checkpointing", False)
    message = refused(driver.Trainer, CONFIG, path)
    assert message.startswith("--gradient-checkpointing: expected a model that can (type --no-gradient-check")
    assert "OPTForCausalLM does not support gradient checkpointing" in message
    assert not driver.Trainer(dataclasses.replace(CONFIG, gradient_checkpointing=False), path).model.training


def test_noise_of_every_config_inside_is_switched_off():
    inside = transformers.GPT2Config(attn_pdrop=0.3)
    config = transformers.GPT2Config(resid_pdrop=0.2, summary_first_dropout=0.1)
    config.text_config, config.router_jitter_noise = inside, 0.01
    driver.switch_off_noise(config)
    assert (
        config.resid_pdrop,
        config.summary_first_dropout,
        config.router_jitter_noise,
        inside.attn_pdrop,
    ) == (0,) * 4


PHI = dict(**SMALL, num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64)
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (
            GPT2,
            dict(tensor_parallel_size=3),
            "--tensor-parallel-size 3: expected a divisor of the model's {'num_att",
        ),
        (
            GPT2,
            dict(tensor_parallel_size=3),
            "multiple of its 1 key-value heads; type --tensor-parallel-size 2",
        ),
        (
            GPT2,
            dict(max_model_len=512),
            "--max-model-len 512: this model has positions for 256 tokens; beyond,",
        ),
        (
            transformers.Phi3Config(**PHI, rope_scaling=LONG),
            {},
            "this model has positions for 64 tokens; beyond, trainer and",
        ),
        (
            transformers.LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            {},
            "found dynamic RoPE scaling, expected another rope_type in config.json: trainer and engine would",
        ),
    ],
)
def test_models_that_do_not_fit(tmp_path, config, flags, message):
    path = model(tmp_path, config)
    settings = dataclasses.replace(CONFIG, **dict(tensor_parallel_size=1) | flags)
    assert message in refused(driver.check_model, settings, path, ["hello"])


@pytest.mark.parametrize(
    ("shape", "scheme"), [("small-qwen3-moe", "fp8_per_channel"), ("tiny-llama", "fp8_per_block")]
)
def test_schemes_that_vllm_has_on_gpus_only(tmp_path, shape, scheme):
    settings = dataclasses.replace(CONFIG, model=shape, quantization=scheme)
    path = write_config(tmp_path, shape)
    message = refused(driver.check_model, settings, path, ["hello"], "cpu")
    assert f"found --quantization {scheme} of {shape}, without a GPU" in message
    assert "Type --quantization fp8-weight-only" in message
    driver.check_model(settings, path, ["hello"], "cuda")
    driver.check_model(dataclasses.replace(settings, quantization="fp8-weight-only"), path, ["hello"], "cpu")


def test_models_that_fit(tmp_path):
    path = model(tmp_path, transformers.Phi3Config(**PHI, rope_scaling=LONG))
    driver.check_model(dataclasses.replace(CONFIG, max_model_len=64), path, ["hello"])


def test_prompts_that_leave_no_room(tmp_path):
    path = model(tmp_path, GPT2)
    settings = dataclasses.replace(CONFIG, tensor_parallel_size=1, max_model_len=100)
    message = refused(driver.check_model, settings, path, ["short", "x" * 90])
    assert message.startswith(
        "Found 1 prompts that leave no room for --max-tokens 32: prompt 2 has 90 tokens. Expected"
    )
    assert message.endswith("type --max-model-len 122")
    driver.check_model(dataclasses.replace(settings, max_model_len=122), path, ["short", "x" * 90])


def test_a_model_without_a_tokenizer(tmp_path):
    path = model(tmp_path, GPT2)
    for file in Path(path).glob("tokenizer*"):
        file.unlink()
    settings = dataclasses.replace(CONFIG, tensor_parallel_size=1, model=path)
    message = refused(driver.check_model, settings, path, ["hello"])
    assert message.startswith(f"--model {path}: expected a tokenizer beside the model. Found: ")


def test_unknown_model(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # no retries where there is no network
    for name in ("no-such/model", str(tmp_path)):
        message = refused(driver.check_model, dataclasses.replace(CONFIG, model=name), name, ["hello"])
        assert message.startswith(f"--model {name}: expected a model on the Hugging Face hub")
        assert "a local folder with config.json, or `tiny`. Found: " in message


def test_a_generation_config_that_transformers_would_not_save(tmp_path):
    path = model(tmp_path / "model", GPT2)
    Path(path, "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95}))
    _, folder = driver.Trainer(CONFIG, path).save_checkpoint(tmp_path)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.95, True)


# ----- Rewards ----------------------------------------------------------------------------------------------


def outputs(*texts: str) -> list:
    """What the loop needs of vLLM's RequestOutput."""
    answers = [SimpleNamespace(text=text, finish_reason="stop", token_ids=(4, 2)) for text in texts]
    answers[0].finish_reason = "length"
    return [SimpleNamespace(prompt="p", outputs=answers)]


def alarm(prompts, completions):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def leave(prompts, completions):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, c: [1.0], "expected 2 finite numbers, one per completion; found 1 numbers"),
        (functools.partial(lambda p, c, n: [1.0] * n, n=3), "one per completion; found 3 numbers"),
        (lambda p, c: [1.0, math.nan], "not finite: [\"nan for 'b'\"]"),
        (lambda p, c: [1e39, 1.0], "not finite: [\"1e+39 for 'a'\"]"),
        (lambda p, c: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda p, c: [None, 1.0], "failed: TypeError"),
        (leave, "failed: SystemExit: 3"),
        (alarm, "It runs in a thread, where signals cannot be set: switch its own time limit off"),
    ],
)
def test_a_broken_reward_is_never_a_zero(reward, message):
    assert message in refused(driver.compute_rewards, outputs("a", "b"), reward, error=RuntimeError)


def test_a_reward_function_that_hangs_ends_in_time():
    def sleep_for_ever(prompts, completions):
        time.sleep(3600)

    message = refused(driver.compute_rewards, outputs("a"), sleep_for_ever, 0.5, error=TimeoutError)
    assert message == "reward function sleep_for_ever has not returned for 0.5 s"


def test_a_reward_can_know_what_was_cut_off():
    def reward(prompts, completions, finish_reasons, completion_ids):
        return [len(ids) * (reason == "stop") for ids, reason in zip(completion_ids, finish_reasons)]

    assert driver.compute_rewards(outputs("a", "b"), reward) == [[0, 2]]
    assert driver.compute_rewards(outputs("a", "b"), functools.partial(reward)) == [[0, 2]]


def test_a_reward_may_lack_a_signature():
    with pytest.raises(ValueError):
        inspect.signature(min)
    with pytest.raises(RuntimeError, match="function min failed: ValueError: could not convert"):
        driver.compute_rewards(outputs("a", "b"), min)  # it was called


def test_a_reward_module_may_fail_in_any_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(("1 / 0", "import nosuch", "def f(:", "raise SystemError", "exit(3)")):
        Path(f"broken_{number}.py").write_text(code)
        message = refused(driver.load_reward, f"broken_{number}:f")
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
    trainer = driver.Trainer(CONFIG, path)
    before = [p.clone() for p in trainer.model.parameters()]
    metrics = trainer.train_step([ROLLOUT | {"advantage": 0.0}])
    assert same(before, list(trainer.model.parameters()))
    assert metrics["grad_norm"] == 0 and metrics["weights_changed"] == 0


def test_a_gradient_that_is_not_finite_changes_nothing(path):
    trainer = driver.Trainer(CONFIG, path)
    trainer.train_step([ROLLOUT])
    before = state(trainer)
    assert "non-finite" in refused(
        trainer.train_step, [ROLLOUT | {"advantage": math.inf}], error=RuntimeError
    )
    assert same(before, state(trainer)) and trainer.step == 1
    trainer.train_step([ROLLOUT])
    assert all(tensor.isfinite().all() for tensor in state(trainer))


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_log_probabilities_that_are_not_finite_stop_the_step(wrong):
    logprobs = SimpleNamespace(logprobs=[-1.0, wrong])
    completion = SimpleNamespace(token_ids=[4, 5], logprobs=logprobs)
    request = SimpleNamespace(prompt_token_ids=[3], outputs=[completion, completion])
    message = refused(driver.to_rollouts, [request], torch.zeros(1, 2), error=RuntimeError)
    assert "log-probabilities of 2 of 2 completions are not finite" in message


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


def test_a_step_that_bfloat16_swallows_shows(path):
    shares = []
    for learning_rate in (1e-6, 1e-2):
        config = dataclasses.replace(CONFIG, trainer_dtype="bfloat16", learning_rate=learning_rate)
        shares.append(driver.Trainer(config, path).train_step([ROLLOUT])["weights_changed"])
    assert shares[0] < 0.1 and shares[1] > 0.5


# ----- Files ------------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_flags(path, tmp_path):
    """The learning rate of the flag; metrics whose last line was cut off are read without it."""
    trainer = driver.Trainer(CONFIG, path)
    trainer.train_step([ROLLOUT])
    assert trainer.save_checkpoint(tmp_path) == (1, tmp_path / "checkpoint-1")
    resumed = driver.Trainer(
        dataclasses.replace(CONFIG, resume=tmp_path / "checkpoint-1", learning_rate=7e-5), path
    )
    assert resumed.step == 1 and [group["lr"] for group in resumed.optimizer.param_groups] == [7e-5]
    assert same(state(trainer), state(resumed))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert driver.read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]
    again = dataclasses.replace(CONFIG, output_dir=tmp_path, resume=tmp_path / "checkpoint-1", steps=3)
    assert driver.check_flags(again)[1] == 1
    for line in ('{"st', "5", "[]", '{"a": 1}', '{"step": "x"}'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
        assert "metrics.jsonl: expected a JSON object with a `step` a line" in refused(
            driver.check_flags, again
        )
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    assert "metrics.jsonl: expected a JSON object with a `step` a line" in refused(driver.check_flags, again)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "Found: ValueError: step 1, and ['con",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "Found: OSError: It looks like the config"),
        (lambda folder: (folder / "trainer.pt").write_text("x"), "Found: RuntimeError: mmap"),
        (lambda folder: torch.save({"step": -3}, folder / "trainer.pt"), "Found: ValueError: step -3"),
        (lambda folder: torch.save({"step": "one"}, folder / "trainer.pt"), "Found: ValueError: step 'one'"),
        (lambda folder: torch.save({}, folder / "trainer.pt"), "Found: KeyError: 'step'"),
    ],
)
def test_a_damaged_checkpoint_is_seen_before_anything_starts(path, tmp_path, break_it, message):
    _, folder = driver.Trainer(CONFIG, path).save_checkpoint(tmp_path)
    torch.save({"step": 1}, folder / "trainer.pt")
    break_it(folder)
    found = refused(driver.check_flags, dataclasses.replace(CONFIG, output_dir=tmp_path, resume=folder))
    assert (
        found.startswith(f"--resume {folder}: expected checkpoint-N of an earlier run. ") and message in found
    )


def test_weights_that_hold_nan_are_named(path, tmp_path):
    broken = transformers.AutoModelForCausalLM.from_pretrained(path)
    broken.model.decoder.layers[0].fc1.weight.data[3, 3] = math.nan
    broken.save_pretrained(tmp_path)
    shutil.copy(f"{path}/tokenizer.json", tmp_path)
    shutil.copy(f"{path}/tokenizer_config.json", tmp_path)
    message = refused(driver.Trainer, CONFIG, str(tmp_path))
    assert "1 weights hold NaN or infinity" in message and "model.decoder.layers.0.fc1.weight" in message


def test_metrics_are_json():
    row = {"a": math.nan, "b": 1.5, "c": "x", "d": -math.inf}
    assert json.loads(driver.to_json(row), parse_constant=pytest.fail) == {
        "a": None,
        "b": 1.5,
        "c": "x",
        "d": None,
    }


def test_half_a_step_is_not_saved(path, tmp_path):
    """With two epochs: when the second one fails, the weights are those of no step."""
    trainer = driver.Trainer(dataclasses.replace(CONFIG, epochs=2), path)
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
    trainer = driver.Trainer(CONFIG, path)
    next(trainer.model.parameters()).data[0, 0] = math.nan
    assert "1 weights hold NaN or infinity" in refused(trainer.save_checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_steps_behind_the_checkpoint(path, tmp_path, capsys):
    trainer = driver.Trainer(CONFIG, path)
    trainer.step = 7
    trainer.save_checkpoint(tmp_path)
    with pytest.raises(SystemExit):
        driver.main(
            driver.Config(model=path, resume=tmp_path / "checkpoint-7", steps=3, output_dir=tmp_path / "out")
        )
    assert "FAILED: --steps 3: expected at least the 7 of " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
