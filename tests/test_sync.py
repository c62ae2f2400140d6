"""The real thing on the CPU: vLLM engines, torchao's FP8, Ray actors, gloo."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import torch
import transformers
from vllm import SamplingParams

from harness import (
    HERE,
    PROMPTS,
    Remote,
    driver,
    fork_server,
    generate,
    helper,
    load_weights,
    observe,
    prove,
    seed_demonstration,
    seed_group,
    seed_loop,
    sync,
    to_prompts,
    vllm_arguments,
)
from local import CONFIG, local_actors, local_pair, worker
from random_models import build_random_model
from rlhf_utils import WeightSender

CPU = torch.device("cpu")
NORM = "model.decoder.final_layer_norm.weight"


def rejoin(config, pair) -> None:
    """Put the trainer actor back in the group after a test was rank 0 itself."""
    helper.join_group(pair.trainer, [pair.actor], timeout_s=config.timeout_s)


@pytest.fixture(scope="module", autouse=True)
def recipe(loading, tmp_path_factory):
    """README's copied program, started before the other tests of this file, as `pair` is: from a folder that
    holds nothing but the helper, with what a machine without a GPU needs instead.
    """
    tmp_path = tmp_path_factory.mktemp("recipe")
    look = "from torchao.quantization.quantize_.workflows.float8 import float8_tensor as patched\n"
    look += "print('product by', patched.addmm_float8_unwrapped_inference.__module__)\n"
    text = (HERE.parent / "README.md").read_text()
    code = re.search(r"<!-- copy the sync -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    path = build_random_model(tmp_path / "model")
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(HERE.parent / "rlhf_utils.py", folder)
    for here, instead in (
        ('"facebook/opt-125m", 2, "cuda"', f'"{path}", 1, "cpu"'),
        ("import json\n", "import json\nfrom torchao.quantization import Float8WeightOnlyConfig\n"),
        ("ray.init()", f"{look}ray.init(num_cpus=2)"),
        ("num_gpus=1", "num_cpus=1"),
        ('{"GPU": 1}', '{"CPU": 1}'),
        ('distributed_executor_backend="ray"', 'distributed_executor_backend="uni", enforce_eager=True'),
        ("config_to_dict(fp8)", "config_to_dict(Float8WeightOnlyConfig())"),
    ):
        assert code.count(here) == 1, here
        code = code.replace(here, instead)
    (folder / "mine.py").write_text(code)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "mine.py"], cwd=folder, **pipes) as process:
        yield process
        process.kill()


def test_two_engines_replay_the_same_weights(models, capsys):
    """One broadcast for both; each is proved."""
    old, new = models("tiny-opt")
    config = dataclasses.replace(CONFIG, model=old, num_engines=2)
    apart = vllm_arguments(distributed_executor_backend="mp")  # what vLLM computes with is global
    with local_actors(), apart, contextlib.ExitStack() as cleanup:
        trainer, engines, ranks = driver.start(config, "cpu", cleanup)
        assert len(ranks) == 2 and "worker (rank 2): 8 linear layers in FP8" in capsys.readouterr().out
        proof = prove(config, trainer, engines)
        assert proof["path"] == "replay" and proof["tensors"] == 2 * 48 and proof["answers"] == 8
        assert proof["changed"] == 2 * 36
        cold = helper.observe(engines, 60)
        driver.wait([trainer.__ray_call__.remote(load_weights, new)], 60, "loading")
        assert sync(config, trainer, engines)["path"] == "replay"
        first, second = helper.observe(engines, 60)
        assert first == second and first["repeatable"]
        assert first["digests"] != cold[0]["digests"] and first["answers"] != cold[0]["answers"]


def test_parameters_may_be_replaced_and_move(models, capsys):
    """In the trainer, in the engine, and another size of buckets, each between two syncs."""
    old, new = models("tiny-llama")
    config = dataclasses.replace(CONFIG, model=old)

    def replace_a_weight(trainer) -> None:
        head = trainer.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())

    def move_weights(trainer) -> None:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.clone()

    def move_a_tensor(llm) -> None:
        norm = worker(llm).get_model().model.norm
        norm.weight.data = norm.weight.data.clone()

    with local_actors(), contextlib.ExitStack() as cleanup:
        trainer, [actor], _ = driver.start(config, "cpu", cleanup)
        prove(config, trainer, actor)
        driver.wait([trainer.__ray_call__.remote(load_weights, new)], 60, "loading")
        assert sync(config, trainer, actor)["path"] == "replay"
        llm = Remote(actor)
        expected = observe(llm)
        capsys.readouterr()
        for who, change, agreements, settings in [
            (trainer, replace_a_weight, 0, {}),
            (trainer, move_weights, 0, {}),
            (actor, move_a_tensor, 0, {}),
            (trainer, lambda trainer: None, 1, {"bucket_bytes": 100_000}),
        ]:
            driver.wait([who.__ray_call__.remote(change)], 60, "changing")
            llm.collective_rpc("reset_weights")
            assert sync(config, trainer, actor, **settings)["path"] == "replay" and observe(llm) == expected
            assert capsys.readouterr().out.count("Agreed on 21 weights") == agreements


def test_no_fp8_layer_is_an_error(models, tmp_path):
    """The commonest silent failure: a torchao config that quantizes nothing."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import ModuleFqnToConfig

    file = tmp_path / "nothing.json"
    file.write_text(json.dumps(config_to_dict(ModuleFqnToConfig({"_default": None}))))
    config, [path, _] = dataclasses.replace(CONFIG, quantization=str(file)), models("tiny-opt")
    with pytest.raises(ValueError, match="a worker has no weight in FP8"):
        with local_pair(path, config):
            pass


def test_rollouts_are_what_vllm_says(config, pair):
    """Ids, texts, log-probabilities: vLLM's own code decodes token by token, and makes a dictionary for each.

    Letters and spaces only, because vLLM drops half a character at the end.
    """
    letters = pair.llm.get_tokenizer()("abc xyz.").input_ids
    same = dict(max_tokens=12, n=3, allowed_token_ids=letters, logprobs=0)
    prompts, seeds = to_prompts(pair.old, PROMPTS), range(0, 12, 3)
    asked = [same | dict(seed=seed, flat_logprobs=True, detokenize=False) for seed in seeds]
    rollouts, seconds, version = pair.llm.rollout(prompts, asked)
    params = [SamplingParams(**same, seed=seed) for seed in seeds]
    outputs = pair.llm.generate(PROMPTS, params, use_tqdm=False)
    plain = [(output.prompt_token_ids, answer) for output in outputs for answer in output.outputs]
    for rollout, (prompt, answer) in zip(rollouts, plain, strict=True):
        assert (rollout.prompt, rollout.completion) == (list(prompt), list(answer.token_ids))
        assert (rollout.text, rollout.finish_reason) == (answer.text, answer.finish_reason)
        said = zip(answer.token_ids, answer.logprobs, strict=True)
        assert rollout.logprobs == [step[token].logprob for token, step in said]
        assert len(rollout.text) == 12 and rollout.finish_reason == "length"
    assert len({rollout.text for rollout in rollouts}) > 6, "each has a seed of its own"
    assert seconds > 0 and version == pair.llm.get_weights_version()


def test_what_the_loop_asks_for(config, pair):
    """Each prompt's G answers stand together, repeat for a step, and differ from those of another step, also
    to the same prompt; greedy there is one. Answers that ended by themselves end with the token that says so.
    """
    config = dataclasses.replace(config, samples_per_prompt=3, max_tokens=20)
    prompts = to_prompts(pair.old, [PROMPTS[0]] * 2 + PROMPTS[1:3])

    def ask(config=config, **how) -> list:
        rollouts, seconds, version = driver.take_in(driver.ask([pair.actor], prompts, config, **how), config)
        assert seconds > 0 and version == pair.llm.get_weights_version()
        return rollouts

    first, greedy = ask(step=1), ask(greedy=True)
    assert first == ask(step=1) and not {*texts(first)} & {*texts(ask(step=2))}
    assert [each.prompt for each in first] == [prompt.token_ids for prompt in prompts for _ in range(3)]
    assert len({*texts(first)}) == 12 and texts(greedy) == texts(ask(step=7, greedy=True))
    assert len(greedy) == 4 and greedy[0] == greedy[1]
    end = pair.llm.get_tokenizer().eos_token_id
    longer = ask(dataclasses.replace(config, max_tokens=100), step=1)
    assert {each.finish_reason for each in longer} == {"stop", "length"}
    for each in longer:
        assert (each.finish_reason == "stop") == (each.completion[-1] == end)
        assert each.finish_reason == "stop" or len(each.completion) == 100
        assert end not in each.completion[:-1] and "</s>" not in each.text
        assert len(each.logprobs) == len(each.completion) and max(each.logprobs) <= 0


def texts(rollouts: list) -> list[str]:
    return [rollout.text for rollout in rollouts]


def test_prefix_cache_is_reset(config, pair):
    """The same prompt before and after: old keys and values would answer for the new weights."""
    params = SamplingParams(temperature=0, max_tokens=1)

    def cached() -> int:
        return pair.llm.generate([PROMPTS[-1]], params, use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached() > 0, "the test needs a prompt that the cache can serve"
    sync(config, pair.trainer, pair.actor)
    assert cached() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_seed_loop(config, pair, dtype):
    """The seed's calls, verbatim in shape, from a trainer of each dtype: non-zero, zero, and each twice in a
    row.
    """
    sync(config, pair.trainer, pair.actor)
    group = seed_group(pair.llm, 2, CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.old, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert all(seed_loop(pair.llm, model, group)), "new weights change every rank"
    first = observe(pair.llm)
    assert not any(seed_loop(pair.llm, model, group)) and observe(pair.llm) == first

    shown = seed_demonstration(pair.llm, group, pair.old, CPU, dtype)
    assert shown["not_zero"] == [] and shown["zero_scales"] == []
    vocabulary = model.config.vocab_size
    assert shown["logprobs"] == pytest.approx([-torch.tensor(float(vocabulary)).log().item()]), (
        "finite and uniform"
    )
    rejoin(config, pair)


def test_wrong_manifest_is_refused_before_a_byte_moves(config, pair):
    """Every mistake in one message, and the engine goes on with what it has."""
    sync(config, pair.trainer, pair.actor)
    before = observe(pair.llm)
    manifest = ray.get(pair.trainer.__ray_call__.remote(lambda trainer: trainer.prepared[0]))
    (first, *_), *rest = manifest
    wrong = [[first, "int64", [3, 3]], *rest[:-1], rest[0], ["model.lora", "bfloat16", [1]]]
    with pytest.raises(RuntimeError) as error:
        ray.get(pair.actor.collective_rpc.remote("agree_on_weights", args=(wrong,)))
    for line in (
        f"misshapen: {first} is [3, 3], the engine's model has [259, 128]",
        f"duplicate: {rest[0][0]}",
        "unexpected: model.lora is [1]",
        f"missing: {rest[-1][0]}",
    ):
        assert line in str(error.value)
    assert observe(pair.llm) == before


def test_engine_refuses_to_generate_while_torn(config, pair):
    """Half an update is no version: refused until a complete sync, which then is right."""
    sync(config, pair.trainer, pair.actor)
    before = observe(pair.llm)
    version = pair.llm.get_weights_version()
    group = seed_group(pair.llm, 2, CPU)
    weight = torch.randn(128)
    updating = pair.actor.collective_rpc.remote("update_weight", args=(NORM, "float32", [128]))
    group.broadcast(weight, src=0)
    ray.get(updating)
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    with pytest.raises(RuntimeError, match="parameters got no weight and are stale: .*embed_tokens.weight"):
        pair.llm.collective_rpc("check_weights_changed")
    with pytest.raises(RuntimeError, match="an `update_weight` has failed"):  # asked again, it is no better
        pair.llm.collective_rpc("check_weights_changed")
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    for name, error in ((NORM, None), ("model.nonsense", "vLLM's loader failed at model.nonsense")):
        updating = pair.actor.collective_rpc.remote("update_weight", args=(name, "float32", [128]))
        group.broadcast(weight, src=0)
        with pytest.raises(RuntimeError, match=error) if error else contextlib.nullcontext():
            ray.get(updating)
    with pytest.raises(RuntimeError, match="an `update_weight` has failed: send all weights again"):
        pair.llm.collective_rpc("check_weights_changed")
    with pytest.raises(RuntimeError, match="refusing to generate"):
        generate(pair.llm)
    rejoin(config, pair)
    sync(config, pair.trainer, pair.actor)
    assert pair.llm.get_weights_version() > version and observe(pair.llm) == before


class Sharded(WeightSender):
    """One of two ranks of an FSDP2 trainer."""

    def __init__(self, path: str, rank: int, port: int):
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        super().__init__(fully_shard(model, mesh=mesh), "cpu")

    def weights(self):
        """Every weight, gathered from both ranks."""
        return ((name, weight.full_tensor()) for name, weight in super().weights())

    def double(self) -> list[int]:
        """Other weights; returns the shape of a shard."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(2)
        return list(self.model.lm_head.weight.to_local().shape)


def make_sharded(*args) -> None:
    """In a forked process: its rank."""
    global sharded
    sharded = Sharded(*args)


def call_sharded(method: str, args: tuple):
    return getattr(sharded, method)(*args)


class Forked:
    """A handle of the Sharded in a process of its own: `handle.method.remote(...)`, as of Ray's."""

    def __init__(self, cleanup: contextlib.ExitStack, *args):
        own = dict(mp_context=fork_server(), initializer=make_sharded, initargs=args)
        self.pool, self._actor_id = concurrent.futures.ProcessPoolExecutor(1, **own), str(args)
        cleanup.callback(self.pool.shutdown)
        self.pool.submit(os.getpid)  # starts the process: both ranks wait for each other

    def __getattr__(self, method: str):
        return SimpleNamespace(remote=lambda *args: self.pool.submit(call_sharded, method, args))


def test_a_sharded_trainer(models, tmp_path):
    """Two `fully_shard` ranks; the engine equals one that starts from the gathered checkpoint."""
    from vllm.utils.network_utils import get_open_port

    config, (old, _), port = CONFIG, models("tiny-llama"), get_open_port()
    model = transformers.AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 2)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(old).save_pretrained(tmp_path)
    with local_actors(), contextlib.ExitStack() as cleanup:
        trainers = [Forked(cleanup, old, rank, port) for rank in (0, 1)]
        both = [dataclasses.replace(config, model=str(path)) for path in (old, tmp_path)]
        actor, fresh = (driver.start_engine(each, "cpu", cleanup) for each in both)
        helper.join_group(trainers[0], [actor], timeout_s=config.timeout_s)
        helper.prove_fp8([actor, fresh])
        assert prove(config, trainers, actor)["path"] == "replay"
        assert driver.wait([trainer.double.remote() for trainer in trainers], 60, "doubling") == [
            [130, 128],
            [129, 128],
        ]
        assert sync(config, trainers, actor)["path"] == "replay"
        assert not helper.differences([actor], helper.observe([fresh], 60, helper.PROMPTS, 16), 60)


def test_the_recipe_in_readme(recipe):
    """It proves, syncs and learns; its process imports the helper, which patches nothing there."""
    out, err = recipe.communicate(timeout=200)
    assert recipe.returncode == 0, err[-3000:]
    assert "product by torchao.float8.inference" in out
    assert "Proved by replay" in out and re.search(r"^2 replay .* '", out, re.MULTILINE)
    assert len(set(re.findall(r"^\d replay .* s '(.*)'$", out, re.MULTILINE))) > 1, "it learns something"
