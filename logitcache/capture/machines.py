"""Ray as logitcache uses it: the connection, the machines that engines need, and what its errors say."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitcache.capture.job import JobOptions
from logitcache.errors import EngineError, InputError, LogitcacheError, first_line


def needs(options: JobOptions) -> tuple[str, int]:
    """The resource that one machine must have for an engine, and how much of it."""
    if options.cpus_per_engine:
        return "CPU", options.cpus_per_engine
    return "GPU", options.gpus_per_engine // options.nodes_per_engine


def room(options: JobOptions) -> tuple[Any, dict[str, Any]]:
    """A placement group for an engine on several machines, None for one; and the actor's options."""
    from ray.util import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    kind, amount = needs(options)
    if options.nodes_per_engine == 1:
        return None, {"num_cpus": amount} if kind == "CPU" else {"num_cpus": 1, "num_gpus": amount}
    group = placement_group([{"CPU": 1, kind: amount}] * options.nodes_per_engine, strategy="STRICT_SPREAD")
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    return group, {"num_cpus": 1, "scheduling_strategy": inside}  # vLLM's workers take the GPUs of the group


def _there_are(kind: str) -> list[int]:
    """How much of a resource each machine of the cluster has."""
    import ray

    return [int(n["Resources"].get(kind, 0)) for n in ray.nodes() if n["Alive"]]


def holding(options: JobOptions) -> int:
    """Machines that are large enough for an engine, or for its part of one."""
    kind, amount = needs(options)
    return sum(found >= amount for found in _there_are(kind))


def holds(options: JobOptions) -> int:
    """Engines that the cluster's machines hold now, at least 1."""
    kind, amount = needs(options)
    fits = sum(found // amount for found in _there_are(kind))
    return max(1, fits // options.nodes_per_engine)


def waiting_for(options: JobOptions) -> str:
    """What an engine without a machine waits for."""
    kind, amount = needs(options)
    largest = max(_there_are(kind), default=0)
    what = f"{amount} {kind}{'s'[: amount > 1]}"
    if largest >= amount:
        return f"waiting for {options.nodes_per_engine} machine(s) with {what} free"
    hint = "; `cpus_per_engine` runs engines on CPUs" if not largest else ""
    return f"waiting for a machine with {what}; the largest has {largest or 'none'}{hint}"


_START = "start one with `ray start --head`, and `ray start --address HOST:6379` on every other machine"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects this process to a cluster during the block, unless it is connected.

    Raises: InputError where Ray is missing, where there is no cluster, and where it refuses this process.
    """
    try:
        import ray
    except ImportError:
        raise InputError("`ray` needs Ray; `pip install 'logitcache[ray]'` on every machine") from None
    from ray.exceptions import AuthenticationError, RayError

    if ray.is_initialized():
        yield
        return
    if address.startswith("ray://"):
        raise InputError(
            f"`ray` {address}: the command must run on a machine of the cluster, for example with `ray job submit`; then give "
            "`ray` auto"
        )
    _refuse_silence(address)
    try:
        ours = {name: value for name, value in os.environ.items() if name.startswith("LOGITCACHE_")}
        more: dict[str, Any] = {"runtime_env": {"env_vars": ours}} if ours else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except AuthenticationError as e:
        raise InputError(
            f"`ray` {address}: the cluster refuses this process's token ({first_line(e)}); set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the one it was started with"
        ) from e
    except (ConnectionError, ValueError, RuntimeError, RayError) as e:
        raise InputError(f"`ray` {address}: Ray cannot connect ({first_line(e)}); {_START}") from e
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Raises: InputError where nothing answers at the address: Ray would try for minutes, or for ever."""
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS", "")
        current = Path("/tmp/ray/ray_current_cluster")  # where Ray notes the cluster that this machine joined
        if not found and current.exists():
            found = current.read_text().strip()
        if not found:
            raise InputError(f"`ray`: no Ray cluster runs on this machine; {_START}")
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as e:
        joined = f"the cluster that this machine joined, {found}, cannot be reached"
        what = joined if found != address else "no Ray cluster can be reached"
        raise InputError(f"`ray` {address}: {what} ({first_line(e)}); {_START}") from None


def get(reference: Any) -> Any:
    """The result of a call of the ledger. Raises: what it raised; EngineError if it is dead."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as e:
        raise cause_of(e) from None
    except RayError as e:
        raise EngineError(
            f"the ledger of the job died ({reason(e)}); everything published is safe: run the same command to resume"
        ) from e


def cause_of(error: Any) -> BaseException:
    """The exception of an actor as its process raised it, in words if it names a missing package."""
    cause = error.cause
    if isinstance(cause, ImportError):
        return InputError(
            f"a machine of the cluster lacks a package ({first_line(cause)}); install the same on all of them"
        )
    return cause if isinstance(cause, LogitcacheError) else error


def reason(error: BaseException) -> str:
    """The first line of Ray's long reports that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if ":" not in line[:20]), type(error).__name__)[:300]
