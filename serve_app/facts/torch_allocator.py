"""Names the environment variables with the settings of torch's allocators."""

from collections.abc import Mapping

# torch reads the first one that is set, and the allocator of CUDA the second one before the first. So whoever sets one
# of them must leave the other one alone.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def names_allocator(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment has settings of torch's allocators."""
    return any(name in environment for name in ALLOCATOR)


def without_allocator(variables: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables without settings of torch's allocators if a process has inherited some, which are the
    user's."""
    if not names_allocator(inherited):
        return dict(variables)
    return {name: value for name, value in variables.items() if name not in ALLOCATOR}
