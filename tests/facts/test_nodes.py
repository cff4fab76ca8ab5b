"""Reading nodes from Ray's resources."""

from serve_app.facts.nodes import node_from_resources


def test_memory_by_gpu_index_is_read_from_custom_resources() -> None:
    """Other resources are left alone."""
    node = node_from_resources("n1", {"CPU": 4.0, "vram_mib_0": 8192.0, "vram_mib_1": 24576.0, "node:n1": 1.0})
    assert (node.cpus, node.gpus, node.vram_gib) == (4.0, 0.0, {0: 8.0, 1: 24.0})
    assert str(node) == "n1: 4 CPUs, GPU 0: 8 GiB, GPU 1: 24 GiB"


def test_whole_gpus_are_rays_own() -> None:
    """A node without GPUs says so."""
    assert str(node_from_resources("n2", {"CPU": 2.0, "GPU": 2.0})) == "n2: 2 CPUs, 2 GPUs"
    assert str(node_from_resources("n3", {"CPU": 2.0})) == "n3: 2 CPUs, 0 GPUs"
