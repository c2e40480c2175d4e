"""Limit the memory of a model host."""

from __future__ import annotations

import resource

_COUNTED = ("RssAnon:", "VmSwap:")


def limit_data(limit_mb: int) -> None:
    """Have the kernel refuse private memory above the limit.

    A lack of memory is then an error, and the host goes on. The limit counts what is mapped, used or not. So it is not
    for a process with an accelerator, whose driver maps the memory of the device.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit_mb << 20
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def private_mb() -> int:
    """Return the private memory that this process uses, in MB.

    Files, shared memory and mappings without memory do not count.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith(_COUNTED)) >> 10
