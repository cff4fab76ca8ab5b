"""How much of this machine's memory and GPUs is in use."""

import time

import psutil
import pytest

from serve_app.facts import device_memory
from serve_app.facts.device_memory import DeviceMemory, node_devices
from serve_app.facts.gpus import Gpu

GIB = 2**30


def test_the_host_and_its_gpus_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever uses them."""
    monkeypatch.setattr(device_memory, "container_memory", lambda host_bytes: None)
    monkeypatch.setattr(device_memory, "local_gpus", lambda: [Gpu(1, "GPU-x", "NVIDIA L4", 24 * GIB, 20 * GIB)])
    host, gpu = node_devices()
    assert (host.device, host.index, host.name, host.total) == ("cpu", None, "memory", psutil.virtual_memory().total)
    assert 0 < host.used < host.total
    assert host.free == host.total - host.used
    assert abs(host.measured_at - time.time()) < 10
    assert (gpu.device, gpu.index, gpu.total, gpu.used, gpu.free) == ("GPU-x", 1, 24 * GIB, 4 * GIB, 20 * GIB)


def test_a_container_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the memory of its host."""
    monkeypatch.setattr(device_memory, "container_memory", lambda host_bytes: (8 * GIB, 3 * GIB))
    host = node_devices()[0]
    assert (host.total, host.used, host.free) == (8 * GIB, 3 * GIB, 5 * GIB)


def test_free_memory_is_never_below_zero() -> None:
    """A limit may have been lowered below the use."""
    assert DeviceMemory("cpu", None, "memory", 5, 7, 0.0).free == 0
