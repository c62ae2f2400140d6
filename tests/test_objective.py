"""Loss, advantages, corrections and rewards, on numbers that a person can check by hand."""

import copy
import dataclasses
import doctest
import importlib
import json
import math
import sys

import pytest
import torch
import transformers

import make_tiny
from architectures import ARCHITECTURES, SMALL
from harness import driver, products_in
from random_models import build_random_model

CONFIG = driver.Config(trainer_device="cpu", learning_rate=1e-3, epochs=1)


def batch(old: list, engine: list, advantages: list, mask: list) -> dict[str, torch.Tensor]:
    """Probabilities instead of log-probabilities, to be readable."""
    return {
        "old_BT": torch.tensor(old).log(),
        "engine_BT": torch.tensor(engine).log(),
        "advantages_B1": torch.tensor(advantages).unsqueeze(1),
        "mask_BT": torch.tensor(mask, dtype=torch.bool),
    }


def loss_and_gradient(probabilities: list, terms: dict, **settings) -> tuple[float, list, dict]:
    """Loss, its gradient by the log-probabilities, and the metrics."""
    logprobs_BT = torch.tensor(probabilities).log().requires_grad_()
    loss, metrics = driver.compute_ppo_loss(logprobs_BT, terms, dataclasses.replace(CONFIG, **settings))
    loss.backward()
    return loss.item(), logprobs_BT.grad.tolist(), {name: float(value) for name, value in metrics.items()}


def test_documentation_examples():
    assert doctest.testmod(driver).failed == doctest.testmod(make_tiny).failed == 0


def test_ppo_clips_only_what_would_go_too_far():
    """Ratios 1.5 and 0.5 with clip 0.2: a gain stops at 1.2 (up) or 0.8 (down); a loss counts in full. 0.5:
    no mask.
    """
    terms = batch([[0.4, 0.4, 0.4], [0.4, 0.4, 0.4]], [[0.4] * 3] * 2, [1.0, -1.0], [[1, 1, 0], [1, 1, 0]])
    loss, gradient, metrics = loss_and_gradient([[0.6, 0.2, 0.9], [0.6, 0.2, 0.9]], terms)
    assert loss == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    assert gradient == [pytest.approx([0, -0.5, 0]), pytest.approx([1.5, 0, 0])]
    assert metrics["ppo_clipped"] == 2 and metrics["corrected"] == 0


def test_token_truncation():
    """Trainer / engine is 4 (cut to C = 2) and 0.5; the gradient of each token is scaled by it."""
    terms = batch([[0.4, 0.4]], [[0.1, 0.8]], [1.0], [[1, 1]])
    loss, gradient, metrics = loss_and_gradient([[0.4, 0.4]], terms)
    assert (
        loss == pytest.approx(-2.5) and gradient == [pytest.approx([-2, -0.5])] and metrics["corrected"] == 1
    )


def test_reference_kl_pulls_back():
    """k3 of p_ref / p = 2: 2 - 1 - log 2, with gradient 1 - 2 by the log-probability."""
    terms = batch([[0.4]], [[0.4]], [0.0], [[1]]) | {"reference_BT": torch.tensor([[0.8]]).log()}
    loss, gradient, metrics = loss_and_gradient([[0.4]], terms, kl_coef=0.1)
    assert loss == pytest.approx(0.1 * (1 - math.log(2))) and metrics["reference_kl"] == pytest.approx(
        1 - math.log(2)
    )
    assert gradient == [pytest.approx([-0.1])]


def test_microbatches_hold_everything_and_little_padding():
    """Short ones first; one that is longer than the limit is alone."""
    rollouts = [driver.Rollout([i] * 2, [0] * n, []) for i, n in enumerate([3, 3, 9, 1, 1, 1])]
    for limit in (10, 19):
        parts = driver.split_by_tokens(rollouts, limit)
        assert [[rollout.prompt[0] for rollout in part] for part in parts] == [[3, 4, 5], [0, 1], [2]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_random_model(tmp_path_factory.mktemp("objective"))


@pytest.fixture(autouse=True)
def no_gradient_limit(monkeypatch):
    monkeypatch.setattr(driver, "MAX_GRAD_NORM", 1e9)


def trained(path: str, rollouts: list, **settings) -> tuple[torch.Tensor, dict]:
    """All weights after one plain gradient step (Adam would blow rounding up), and its metrics."""
    trainer = driver.Trainer(dataclasses.replace(CONFIG, model=path, **settings))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    metrics = trainer.train_step(rollouts)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]), metrics


@pytest.fixture(scope="module")
def rollouts():
    """Different lengths, so that padding takes part."""
    sizes = [3, 5, 7, 9]
    return [
        driver.Rollout([9] * (i + 1), [*range(20, 20 + size)], [-5.5] * size, advantage=i - 1.0)
        for i, size in enumerate(sizes)
    ]


def test_batch_size_is_not_bound_by_memory(path, rollouts):
    """The same step in one pass or in four, and with activations that are kept."""
    expected, metrics = trained(path, rollouts)
    start, _ = trained(path, [dataclasses.replace(rollout, advantage=0.0) for rollout in rollouts])
    assert (expected - start).abs().max() > 1e-3, "the step moved something"
    for settings in (dict(tokens_per_microbatch=1), dict(gradient_checkpointing=False)):
        weights, other = trained(path, rollouts, **settings)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        assert {name: other[name] for name in ("loss", "mismatch_kl")} == pytest.approx(
            {name: metrics[name] for name in ("loss", "mismatch_kl")}, rel=1e-4
        )


@pytest.mark.parametrize(("fit", "kept"), [(None, [0, 2, 4]), (5, [0, 2, 4]), (2, [0, 3]), (0, [])])
def test_a_third_of_the_layers_keeps_its_activations(fit, kept, monkeypatch):
    """Or as many as fit a GPU. The others run once more in the backward pass, in a model that stays in
    evaluation mode."""
    config = transformers.Qwen3Config(**SMALL | dict(num_hidden_layers=7, head_dim=64))
    model, runs = transformers.AutoModelForCausalLM.from_config(config).eval(), []
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    if fit is not None:
        free = 10**9 + 13 * model.num_parameters() + driver.activation_bytes(CONFIG, config, fit) + 1
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 10**10))
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    driver.checkpoint_layers(model, CONFIG)
    tokens_BL = torch.arange(3, 11)[None]
    batch = {"tokens_BL": tokens_BL, "mask_BT": torch.ones(1, 7, dtype=torch.bool)}
    driver.completion_logprobs(model, batch).sum().backward()
    assert [number for number in range(7) if runs.count(number) == 1] == kept and len(runs) == 14 - len(kept)
    assert not any(module.training for module in model.modules())


def test_only_completions_are_learned(path, rollouts):
    """Position t predicts token t + 1: the mask starts at the prompt's last token and ends before the
    padding.
    """
    padded = driver.Trainer(dataclasses.replace(CONFIG, model=path))._pad(rollouts)
    for row, rollout in enumerate(rollouts):
        targets = padded["tokens_BL"][row, 1:][padded["mask_BT"][row]].tolist()
        assert targets == rollout.completion
        assert padded["engine_BT"][row][padded["mask_BT"][row]].tolist() == rollout.logprobs
        assert padded["advantages_B1"][row] == rollout.advantage


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_whole_logits_but_every_scale_and_cap(name, monkeypatch):
    """Values and gradients of the model's own logits, with attention to the padding masked out; its
    activations are computed again.
    """
    monkeypatch.setattr(driver, "HEAD_ROWS", 16)
    class_name, differs = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**SMALL | differs)
    if "final_logit_softcapping" in vars(config):
        config.final_logit_softcapping = 2.0
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tokens_BL, mask_BT = torch.randint(3, 300, (3, 40)), torch.zeros(3, 39, dtype=torch.bool)
    attend_BL = torch.ones_like(tokens_BL)
    for row, end in enumerate([40, 30, 17]):
        mask_BT[row, 8 : end - 1] = True
        attend_BL[row, end:] = tokens_BL[row, end:] = 0
    names = [*model.state_dict()]
    logits_BTV = model(input_ids=tokens_BL, attention_mask=attend_BL).logits[:, :-1] / 0.7
    plain_BT1 = logits_BTV.log_softmax(-1).gather(-1, tokens_BL[:, 1:, None])
    plain_BT = plain_BT1.squeeze(-1).masked_fill(~mask_BT, 0.0)
    driver.checkpoint_layers(model, CONFIG)
    rows = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
    ours_BT = driver.completion_logprobs(model, {"tokens_BL": tokens_BL, "mask_BT": mask_BT}, 0.7)
    torch.testing.assert_close(ours_BT, plain_BT)
    assert max(rows) == 16 and sum(rows) == mask_BT.sum()
    assert [*model.state_dict()] == names, "of tied weights the first name counts"
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(plain_BT.sum(), parameters, allow_unused=True)
    found = torch.autograd.grad(ours_BT.sum(), parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_products_in_bfloat16_leave_weights_and_gradients_in_float32(path, rollouts):
    """Master weights, gradients and AdamW's state; and the products do differ."""
    seen = {}
    for precision in ("float32", "bfloat16"):
        trainer = driver.Trainer(dataclasses.replace(CONFIG, model=path))
        trainer.model.get_input_embeddings().weight.register_hook(lambda grad: dtypes.append(grad.dtype))
        dtypes = []
        with products_in(precision):  # BF16, as on GPUs
            seen[precision] = trainer.train_step(rollouts)["mismatch_kl"]
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert {tensor.dtype for tensor in [*trainer.model.parameters(), *states]} == {torch.float32}
        assert set(dtypes) == {torch.float32}
    assert seen["float32"] != seen["bfloat16"] == pytest.approx(seen["float32"], rel=0.05)


def test_bfloat16_keeps_updates_that_are_smaller_than_its_steps(path, rollouts, tmp_path):
    """By rounding at random: on average all of an update arrives, of which rounding to the nearest would lose
    nearly all. A resumed run draws the same random numbers."""
    config = dataclasses.replace(CONFIG, model=path, trainer_dtype="bfloat16", learning_rate=1e-6)
    exact = driver.Trainer(dataclasses.replace(config, trainer_dtype="float32"))
    trainer = driver.Trainer(config)

    def weights(model) -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in model.parameters() if each.ndim == 2]).double()

    before = weights(exact.model)
    for each in (exact, trainer):
        each.train_step(rollouts)
    wanted, found = weights(exact.model) - before, weights(trainer.model) - before
    nearest = weights(exact.model).bfloat16().double() - before
    arrived = [((wanted * moved).sum() / (wanted * wanted).sum()).item() for moved in (found, nearest)]
    assert arrived[0] == pytest.approx(1, abs=0.1) and arrived[1] < 0.5
    assert found.abs().max() < 0.02, "one step of BF16 at most"
    _, folder = trainer.save_checkpoint(tmp_path)
    trainer.optimizer.param_groups[0]["lr"].fill_(2e-5)  # the flag's
    trainer.train_step(rollouts)
    resumed = driver.Trainer(dataclasses.replace(config, resume=folder, learning_rate=2e-5))
    resumed.train_step(rollouts)
    assert weights(trainer.model).equal(weights(resumed.model)) and trainer.model.dtype == torch.bfloat16


def test_second_epoch_clips_and_sees_the_reference(path, rollouts, monkeypatch):
    """In the first epoch policy, old policy and reference are one."""
    monkeypatch.setattr(driver, "CLIP", 1e-4)
    once = trained(path, rollouts, kl_coef=0.1)[1]
    twice = trained(path, rollouts, kl_coef=0.1, epochs=2)[1]
    assert once["reference_kl"] == 0 and once["ppo_clipped"] == 0
    assert twice["reference_kl"] > 0 and twice["ppo_clipped"] > 0


def test_rounding_on_the_wire_is_a_mismatch_of_its_own(path, rollouts):
    """Without any engine: as soon as FP32 weights are trained, their BF16 copy is a slightly other policy."""
    trainer = driver.Trainer(dataclasses.replace(CONFIG, model=path))
    for expected in (False, True):
        batch, rounded = trainer._pad(rollouts), copy.deepcopy(trainer.model).bfloat16().float()
        with torch.no_grad():
            exact, wire = (
                driver.completion_logprobs(model, batch)[batch["mask_BT"]]
                for model in (trainer.model, rounded)
            )
        assert (driver.measure_mismatch(exact, wire)["mismatch_kl"] > 1e-5) == expected
        trainer.train_step(rollouts)


# ----- Rewards ----------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "1 + 1?"}]


def answers(*texts: str) -> list:
    """Rollouts, each as long as its text; the first was cut off."""
    rollouts = [driver.Rollout([3], [*range(len(text))], [-1.0] * len(text), text) for text in texts]
    rollouts[0].finish_reason = "length"
    return rollouts


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """Writes functions to my_rewards.py, where the program is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    return (tmp_path / "my_rewards.py").write_text


def test_a_reward_as_trls_users_have_it(reward_file):
    """Called by name, with a list for each column: an entry for each completion, prompt by prompt."""
    reward_file("""
def exact(completions, answer, **kwargs):
    assert {*kwargs} == {"prompts", "completion_ids", "finish_reasons", "level"}, kwargs
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]
""")
    reward = driver.load_reward("my_rewards:exact", {"answer", "level"})
    prompts = [driver.Prompt(text, {"answer": text, "level": 1}, [3], text) for text in "ab"]
    rewards_PG = driver.compute_rewards(prompts, answers("a", "b", "a", "b", "b", "b"), reward)
    assert rewards_PG.tolist() == [[1, 0, 1], [1, 1, 1]] and rewards_PG.dtype == torch.float64


def test_a_reward_gets_what_it_asks_for_and_no_more(reward_file):
    """Optional columns if they are there; what was cut off; all ids; prompts as they are in the file."""
    reward_file("""
def whole(completion_ids, finish_reasons, prompts, answer=7, missing=3, *, level=None):
    assert (prompts, answer, missing, level) == (["p", "p"], 7, 3, [1, 1])
    return [len(ids) * (reason == "stop") for ids, reason in zip(completion_ids, finish_reasons)]
""")
    reward = driver.load_reward("my_rewards:whole", {"level", "other"})
    prompt = driver.Prompt("p", {"level": 1, "other": 2}, [3], "<s>p")
    assert driver.compute_rewards([prompt], answers("a", "bc"), reward).tolist() == [[0, 2]]


def test_chat_prompts_are_answered_by_messages(reward_file):
    reward_file("""
def brief(prompts, completions):
    assert prompts == [[{"role": "user", "content": "1 + 1?"}]] * 2
    for [message] in completions:
        assert {*message} == {"role", "content"} and message["role"] == "assistant"
    return [-len(message["content"]) for [message] in completions]
""")
    prompt = driver.Prompt(QUESTION, {}, [3], "[user]1 + 1?")
    reward = driver.load_reward("my_rewards:brief", set())
    assert driver.compute_rewards([prompt], answers("abc", ""), reward).tolist() == [[-3, 0]]
    # The one that is shipped for any prompts, too.
    assert driver.compute_rewards([prompt], answers("ab1X", ""), driver.letters).tolist() == [[0.5, 0]]


def test_shipped_rewards():
    prompt = driver.Prompt("Backwards: ab ->", {"answer": "ba"}, [3], "Backwards: ab ->")
    for name, expected in (("letters", [0.5, 0]), ("backwards", [0, 0])):
        reward = driver.load_reward(name, {"answer"})
        assert driver.compute_rewards([prompt], answers("ab1X", ""), reward).tolist() == [expected]


# ----- The tiny model's task --------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (driver.TINY / name).read_text().splitlines()]


def test_the_tiny_models_prompts_are_those_that_make_tiny_draws():
    assert rows_of("prompts.jsonl") == make_tiny.ask_backwards("prompts", 1280)
    assert rows_of("held_out.jsonl") == make_tiny.ask_backwards("held out", 100, held_out=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(driver.TINY)
    assert tokenizer.get_vocab() == make_tiny.byte_tokenizer().get_vocab()
    assert sum(file.stat().st_size for file in driver.TINY.iterdir()) < 10**6


def test_held_out_words_are_never_trained_on():
    """Neither they nor an anagram of theirs: by RL, or by the examples before."""

    def words(rows: list[dict]) -> set:
        return {"".join(sorted(row["answer"])) for row in rows}

    taught = (make_tiny.ask_backwards(f"teach {batch}", 64) for batch in range(300))
    seen = words(rows_of("prompts.jsonl")).union(*map(words, taught))
    assert len(seen) > 10000 and not seen & words(rows_of("held_out.jsonl"))


def test_backwards_can_only_be_earned_by_reading():
    """One answer to all prompts earns what chance gives (1 letter in 26), reading earns all."""
    prompts, right = zip(*(row.values() for row in rows_of("prompts.jsonl")), strict=True)
    assert len(set(prompts)) == len(prompts)
    for constant in (" edcba", " eeeee", "", right[0]):
        assert sum(driver.backwards([constant] * len(right), right)) / len(right) < 0.06
    assert driver.backwards([prompt[-4:-9:-1] for prompt in prompts], right) == [1.0] * len(right)
    assert driver.backwards(["", "b", "a"], ["", "ab", "b"]) == [0, 0, 0]


def test_the_tiny_model_has_begun_what_is_left_to_rl():
    """Some letters right at every place, hardly a word; the answer ends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(driver.TINY, dtype=torch.float32)
    tokenizer, rows = transformers.AutoTokenizer.from_pretrained(driver.TINY), rows_of("held_out.jsonl")
    tokens = torch.tensor(tokenizer([row["prompt"] for row in rows]).input_ids)
    ended = model.generate(input_ids=tokens, max_new_tokens=12, do_sample=False)[:, tokens.shape[1] :]
    texts = tokenizer.batch_decode(ended, skip_special_tokens=True)
    rewards = driver.backwards(texts, [row["answer"] for row in rows])
    assert 0.2 < sum(rewards) / 100 < 0.8 and rewards.count(1.0) <= 10
    pairs = [(row["answer"], text.strip().ljust(5)) for row, text in zip(rows, texts, strict=True)]
    assert all(sum(answer[i] == text[i] for answer, text in pairs) > 10 for i in range(5))
    assert (ended == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.9
