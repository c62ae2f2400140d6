"""Programs in the background, one Ray, its actors, and the models: made once for all tests."""

import concurrent.futures
import contextlib
import dataclasses
import os
from types import SimpleNamespace

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # as Ray gives its actors: the number of threads changes the last bits

from harness import (
    DEVICE,
    Remote,
    RolloutLLM,
    connect,
    driver,
    fork_server,
    helper,
    vllm_arguments,
    with_length,
)
from random_models import build_random_model

# Without a GPU the engine is not compiled but for one small function at TP > 1; finding a compiler takes each
# worker 3 s. (This process, which has imported PyTorch, compiles on.)
os.environ["TORCH_COMPILE_DISABLE"] = "1"
if DEVICE == "cpu":
    driver.RolloutLLM = RolloutLLM


# Architectures ask for what comes last from the background, and what has limits of time comes behind it.
LAST = ["test_architectures", "test_program", "test_sync", "test_faults"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LAST.index(item.path.stem) if item.path.stem in LAST else -1)


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """Futures of what programs do, by the fixture with which tests ask for it. They run one after another
    from the start on, and the tests of this process take the other core.
    """
    from test_architectures import follow_at_two
    from test_program import ENDS, end, run_default

    works = {"ends": [(end, *how) for how in ENDS]}  # then those whose workers need both cores at a time
    works |= {"found_at_two": [(follow_at_two,)], "default_run": [(run_default,)]}
    asked, futures = {name for item in request.session.items for name in item.fixturenames}, {}
    if asked & works.keys():
        fork_server()  # here, where pytest captures what it and its forks print
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for name in (name for name in works if name in asked):
            calls = [(work, tmp_path_factory.mktemp(name), *how) for work, *how in works[name]]
            futures[name] = [pool.submit(*call) for call in calls]
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(shape)` returns the folders of two BF16 checkpoints."""
    built = {}

    def build(shape: str) -> tuple[str, str]:
        if shape not in built:
            folder = tmp_path_factory.mktemp(shape)
            old = build_random_model(folder / "old", shape, seed=1)
            built[shape] = old, build_random_model(folder / "new", shape, seed=2)
        return built[shape]

    return build


@pytest.fixture(scope="session")
def config():
    """The program's defaults on this machine, connected to a private Ray."""
    fork_server()  # before Ray, whose actors are to know it
    with contextlib.ExitStack() as cleanup:
        eager = '{"enforce_eager": true, "gpu_memory_utilization": 0.1}'
        on_gpus = dict(tensor_parallel_size=1, engine_args=eager) if DEVICE == "cuda" else {}
        wanted = with_length(driver.Config(epochs=1, **on_gpus))
        config, _ = driver.resolve(wanted, connect(dataclasses.replace(wanted, num_engines=2), cleanup))
        yield config


@pytest.fixture(scope="session")
def loading(config, models):
    """An engine from a tiny OPT checkpoint at TP=2 and three trainers that hold another, which load side by
    side, each with what stops it: for `pair`, and for tests that kill some.
    """
    old, new = models("tiny-opt")
    with contextlib.ExitStack() as cleanup:

        def load(start, model: str, *more) -> tuple:
            own = cleanup.enter_context(contextlib.ExitStack())
            return start(dataclasses.replace(config, model=model), *more, own), own

        with vllm_arguments(worker_extension_cls="harness.Extension"):
            engine = load(driver.start_engine, old, "cpu")
        trainers = [load(driver.start_trainer, new) for _ in range(3)]
        yield SimpleNamespace(engine=engine, trainers=trainers)


@pytest.fixture(scope="session")
def pair(config, models, loading):
    """An engine and a trainer that holds another checkpoint, in one group."""
    old, new = models("tiny-opt")
    (actor, _), (trainer, trainer_only) = loading.engine, loading.trainers[0]
    helper.join_group(trainer, [actor], timeout_s=config.timeout_s)
    helper.prove_fp8([actor])
    pair = SimpleNamespace(trainer=trainer, actor=actor, llm=Remote(actor), old=old, new=new)
    pair.trainer_only = trainer_only  # a test may replace both
    return pair
