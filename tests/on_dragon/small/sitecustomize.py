"""Lets Dragon find more CPUs and GPUs than there are; chained to by the product's own.

``RHAPSODY_TEST_CPUS``, ``RHAPSODY_TEST_GPUS``: how many each node says it has. Two ranks on a node
need four logical CPUs, and Batch takes half of them for workers.
``RHAPSODY_TEST_SLOW_GROUPS``: a file with the seconds that groups of MPI ranks take to go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

# As the product's sitecustomize has loaded it, before it ran this one.
from rhapsody_idle_patches import install  # type: ignore[import-not-found]


def _cpus(module: Any) -> None:
    # Not os.cpu_count itself: programs in there shall see what is. Affinity stays real, too.
    node_conf = module.NodeDescriptor.get_localservices_node_conf.__func__

    def get_localservices_node_conf(cls: Any, *args: Any, **kwargs: Any) -> Any:
        node = node_conf(cls, *args, **kwargs)
        node.num_cpus = int(os.environ["RHAPSODY_TEST_CPUS"])
        return node

    module.NodeDescriptor.get_localservices_node_conf = classmethod(get_localservices_node_conf)


def _gpus(module: Any) -> None:
    devices = list(range(int(os.environ["RHAPSODY_TEST_GPUS"])))
    module.find_accelerators = lambda: module.AcceleratorDescriptor(
        vendor=module.AccVendor.NVIDIA, device_list=devices, env_str="CUDA_VISIBLE_DEVICES"
    )


def _slow_groups(module: Any) -> None:
    # As on a slow machine: when its ranks have ended, a group of MPI takes this long to go.
    clean_up = module.cleanup_pmix_resources

    def cleanup_pmix_resources(guid: int) -> Any:
        with open(os.environ["RHAPSODY_TEST_SLOW_GROUPS"]) as seconds:
            time.sleep(float(seconds.read()))
        return clean_up(guid)

    module.cleanup_pmix_resources = cleanup_pmix_resources


patches: dict[str, Callable[[Any], None]] = {}
if "RHAPSODY_TEST_CPUS" in os.environ:
    patches["dragon.infrastructure.node_desc"] = _cpus
if "RHAPSODY_TEST_GPUS" in os.environ:
    patches["dragon.infrastructure.gpu_desc"] = _gpus
if "RHAPSODY_TEST_SLOW_GROUPS" in os.environ:
    patches["dragon.globalservices.group"] = _slow_groups
if patches:
    install(patches)
