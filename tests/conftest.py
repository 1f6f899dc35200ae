"""The environment every test runs in. The variables must be set before JAX starts its backends."""

import contextlib
import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

# XLA compiles inside an example, so time says nothing about a test: no deadline.
_COMMON = dict(deadline=None, max_examples=40, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("dev", **_COMMON)
hypothesis.settings.register_profile("ci", derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("thorough", **{**_COMMON, "max_examples": 1000})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fast tests spend their time in the compiler: theirs does little. Slow ones, and those marked `optimized`, get
    what users get; their fixtures too, so that bits can be compared. Those that are only long, `slow(optimized=False)`,
    are compiled as fast ones.
    """
    slow = item.get_closest_marker("slow")
    as_users = item.get_closest_marker("optimized") or (slow and slow.kwargs.get("optimized", True))
    jax.config.update("jax_disable_most_optimizations", not as_users and jax.default_backend() == "cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Strict promotion: an accidental int32 * float32, which a user's program might see as float64, is an error."""
    standard = item.get_closest_marker("standard_promotion")
    with contextlib.nullcontext() if standard else jax.numpy_dtype_promotion("strict"):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item):
    """Forgets compiled programs in time: each takes some mappings of memory, and a process may have 65530 of them.

    Behind that number XLA crashes without a word.
    """
    global _finished
    _finished += 1
    if _finished % 20 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


_MAPS, _finished = Path("/proc/self/maps"), 0
