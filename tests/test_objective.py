"""Loss, advantages, corrections and rewards, on numbers that a person can check by hand."""

import copy
import dataclasses
import doctest
import math

import pytest
import torch
import transformers

from architectures import ARCHITECTURES, SMALL
from harness import driver
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
    assert doctest.testmod(driver).failed == 0


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


def test_microbatches_hold_everything_in_order():
    rollouts = [{"prompt": [0] * 2, "completion": [0] * n} for n in (3, 3, 9, 1, 1, 1)]
    parts = driver.split_by_tokens(rollouts, 10)
    assert sum(parts, []) == rollouts and [len(part) for part in parts] == [2, 1, 3]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build_random_model(tmp_path_factory.mktemp("objective"))


@pytest.fixture(autouse=True)
def no_gradient_limit(monkeypatch):
    monkeypatch.setattr(driver, "MAX_GRAD_NORM", 1e9)


def trained(path: str, rollouts: list[dict], **settings) -> tuple[torch.Tensor, dict]:
    """All weights after one plain gradient step (Adam would blow rounding up), and its metrics."""
    trainer = driver.Trainer(dataclasses.replace(CONFIG, **settings), path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    metrics = trainer.train_step(rollouts)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]), metrics


@pytest.fixture(scope="module")
def rollouts():
    """Different lengths, so that padding takes part."""
    return [
        {
            "prompt": [9] * (i + 1),
            "completion": list(range(20, 23 + 2 * i)),
            "logprobs": [-5.5] * (3 + 2 * i),
            "advantage": i - 1.0,
        }
        for i in range(4)
    ]


def test_batch_size_is_not_bound_by_memory(path, rollouts):
    """The same step in one pass or in four, and with activations that are kept."""
    expected, metrics = trained(path, rollouts)
    start, _ = trained(path, [rollout | {"advantage": 0.0} for rollout in rollouts])
    assert (expected - start).abs().max() > 1e-3, "the step moved something"
    for settings in (dict(tokens_per_microbatch=1), dict(gradient_checkpointing=False)):
        weights, other = trained(path, rollouts, **settings)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        assert {name: other[name] for name in ("loss", "mismatch_kl")} == pytest.approx(
            {name: metrics[name] for name in ("loss", "mismatch_kl")}, rel=1e-4
        )


def test_a_third_of_the_layers_keeps_its_activations():
    config = transformers.Qwen3Config(**SMALL | dict(num_hidden_layers=7, head_dim=64))
    model = transformers.AutoModelForCausalLM.from_config(config)
    driver.checkpoint_layers(model)
    again = [layer.gradient_checkpointing for layer in model.model.layers]
    assert again == [False, True, True, False, True, True, False] and model.training


def test_only_completions_are_learned(path, rollouts):
    """Position t predicts token t + 1: the mask starts at the prompt's last token and ends before the
    padding.
    """
    padded = driver.Trainer(CONFIG, path)._pad(rollouts)
    for row, rollout in enumerate(rollouts):
        targets = padded["tokens_BL"][row, 1:][padded["mask_BT"][row]].tolist()
        assert targets == rollout["completion"]
        assert padded["engine_BT"][row][padded["mask_BT"][row]].tolist() == rollout["logprobs"]


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
    driver.switch_off_noise(config)
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
    driver.checkpoint_layers(model)
    ours_BT = driver.completion_logprobs(model, {"tokens_BL": tokens_BL, "mask_BT": mask_BT}, 0.7)
    torch.testing.assert_close(ours_BT, plain_BT)
    assert [*model.state_dict()] == names, "of tied weights the first name counts"
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(plain_BT.sum(), parameters, allow_unused=True)
    found = torch.autograd.grad(ours_BT.sum(), parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_head_that_does_more_is_refused(path):
    """Whatever a model does before its trunk or knows of the whole sequence afterwards would be lost."""

    class Longer(transformers.OPTForCausalLM):
        def forward(self, input_ids, **more):
            output = super().forward(input_ids, **more)
            output.logits[..., 3:9] *= input_ids.shape[1]
            return output

    model = Longer.from_pretrained(path, dtype=torch.float32)
    with pytest.raises(ValueError, match="log-probabilities of Longer in parts are off by"):
        driver.check_parts(model)
    with pytest.raises(ValueError, match="OPTModel has no base model; expected a model whose forward is its"):
        driver.check_parts(model.base_model)


def test_products_in_bfloat16_leave_weights_and_gradients_in_float32(path, rollouts):
    """Master weights, gradients and AdamW's state; and the products do differ."""
    seen = {}
    for precision in ("float32", "bfloat16"):
        trainer = driver.Trainer(CONFIG, path)
        trainer.in_bf16 = precision == "bfloat16"  # as on GPUs
        trainer.model.get_input_embeddings().weight.register_hook(lambda grad: dtypes.append(grad.dtype))
        dtypes = []
        seen[precision] = trainer.train_step(rollouts)["mismatch_kl"]
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert {tensor.dtype for tensor in [*trainer.model.parameters(), *states]} == {torch.float32}
        assert set(dtypes) == {torch.float32}
    assert seen["float32"] != seen["bfloat16"] == pytest.approx(seen["float32"], rel=0.05)


def test_second_epoch_clips_and_sees_the_reference(path, rollouts, monkeypatch):
    """In the first epoch policy, old policy and reference are one."""
    monkeypatch.setattr(driver, "CLIP", 1e-4)
    once = trained(path, rollouts, kl_coef=0.1)[1]
    twice = trained(path, rollouts, kl_coef=0.1, epochs=2)[1]
    assert once["reference_kl"] == 0 and once["ppo_clipped"] == 0
    assert twice["reference_kl"] > 0 and twice["ppo_clipped"] > 0


def test_rounding_on_the_wire_is_a_mismatch_of_its_own(path, rollouts):
    """Without any engine: as soon as FP32 weights are trained, their BF16 copy is a slightly other policy."""
    trainer = driver.Trainer(CONFIG, path)
    for expected in (False, True):
        batch, rounded = trainer._pad(rollouts), copy.deepcopy(trainer.model).bfloat16().float()
        with torch.no_grad():
            exact, wire = (
                trainer._logprobs(model, batch)[batch["mask_BT"]] for model in (trainer.model, rounded)
            )
        assert (driver.measure_mismatch(exact, wire)["mismatch_kl"] > 1e-5) == expected
        trainer.train_step(rollouts)


def output(prompt: str, *texts: str):
    """What the loop needs of vLLM's RequestOutput."""
    from types import SimpleNamespace

    return SimpleNamespace(prompt=prompt, outputs=[SimpleNamespace(text=text) for text in texts])


def test_shipped_rewards():
    assert driver.compute_rewards([output("", "ab1X", "")]) == [[0.5, 0.0]]


def test_backwards_can_only_be_earned_by_reading():
    """One answer to all prompts earns what chance gives (1 letter in 26), reading earns all."""
    config = driver.Config(reward="backwards", prompts_per_step=500)
    prompts = driver.prompts_of_step(config, [], 0)
    assert prompts != driver.prompts_of_step(config, [], 1) and len(set(prompts)) == 500
    for constant in (" edcba", " eeeee", "", prompts[0][-4:-9:-1]):
        assert sum(driver.backwards(prompts, [constant] * 500)) / 500 < 0.06
    assert driver.backwards(prompts, [prompt[-4:-9:-1] for prompt in prompts]) == [1.0] * 500
    assert driver.backwards(["", "Say: a b", "?"], ["", "b", "a"]) == [0, 1, 0]


def test_held_out_words_are_never_trained_on():
    """Neither they nor an anagram of theirs, in whatever step, seed or warm-up."""

    def words(*args, **options) -> set:
        return {"".join(sorted(prompt.split()[1])) for prompt in driver.ask_backwards(*args, **options)}

    held_out = words("held out", 100, held_out=True)
    assert not held_out & set().union(*(words(str(i), 1000) for i in range(50)))


def test_warm_up_begins_what_is_left_to_rl(tmp_path, capsys):
    """The same for the same seed, however many cores there are; some letters right at every place, hardly a
    word; the answer ends.
    """
    weights = []
    for folder, threads in ((str(tmp_path / "a"), 1), (str(tmp_path / "b"), 2)):
        torch.set_num_threads(threads)
        driver.warm_up(driver.build_tiny_model(folder, 1), 1)
        model = driver.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(*weights) and "of the letters are right" in capsys.readouterr().out
    prompts, tokenizer = driver.ask_backwards("held out", 100, held_out=True), driver.byte_tokenizer()
    tokens = torch.tensor(tokenizer(prompts).input_ids)
    ended = model.generate(input_ids=tokens, max_new_tokens=12, do_sample=False)[:, tokens.shape[1] :]
    rewards = driver.backwards(prompts, tokenizer.batch_decode(ended, skip_special_tokens=True))
    assert 0.2 < sum(rewards) / 100 < 0.8 and rewards.count(1.0) < 50
    assert (ended == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, c: [1.0], "expected 2 finite numbers, one per completion; found 1 numbers"),
        (lambda p, c: [1.0, math.nan], "not finite: [\"nan for 'b'\"]"),
        (lambda p, c: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda p, c: [None, 1.0], "failed: TypeError"),
    ],
)
def test_a_broken_reward_is_never_a_zero(reward, message):
    with pytest.raises(RuntimeError) as error:
        driver.compute_rewards([output("p", "a", "b")], reward)
    assert message in str(error.value)


def test_load_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def brief(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    assert driver.compute_rewards([output("p", "abc", "")], driver.load_reward("my_rewards:brief")) == [
        [-3, 0]
    ]
    for name in ("nothing", "my_rewards:no", "no_such_module:f"):
        with pytest.raises(
            ValueError, match=f"--reward {name}: expected backwards, letters, or module:function"
        ):
            driver.load_reward(name)
