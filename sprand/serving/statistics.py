"""What a pool of adapters has done and holds, as numbers and in the text form that Prometheus reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

HELP = {
    "adapters": "Adapters that the pool knows.",
    "resident": "Adapters in host memory.",
    "requests": "Requests and forwards that were let in.",
    "waiting": "Requests that wait for their turn.",
    "waited_seconds": "Seconds that requests have waited in all.",
    "switches": "Changes of what the weights hold.",
    "host_bytes": "Host memory of all adapters.",
    "device_bytes": "Memory of their copies on GPUs.",
    "reads": "Adapters that were read again from disk.",
    "removals": "Adapters that made room in host memory.",
    "hits": "Packed parts that a switch found on the device.",
    "misses": "Packed parts that a switch copied to the device.",
    "evictions": "Copies on the device that made room for others.",
    "uploaded_bytes": "Bytes of all copies to devices.",
}
GAUGES = ("adapters", "resident", "waiting", "host_bytes", "device_bytes")  # all others count up


@dataclass(frozen=True)
class Statistics:
    """What a pool has done and holds.

    Attributes:
        adapters: how many it knows.
        resident: how many of them are in host memory.
        requests: blocks, and forwards outside of them, that were let in.
        waiting: those that wait for their turn now.
        waited_seconds: that all of them have waited.
        switches: changes of what the weights hold.
        host_bytes: of all adapters, in host memory.
        device_bytes: of their copies on GPUs; 0 where the model is on the CPU, which needs none.
        reads: adapters that were read again after they had made room in host memory.
        removals: how often one made room there.
        hits: packed parts (positions, values) that a switch found on the device.
        misses: those that it had to copy there.
        evictions: copies that made room for others.
        uploaded_bytes: of all copies.
    """

    adapters: int
    resident: int
    requests: int
    waiting: int
    waited_seconds: float
    switches: int
    host_bytes: int
    device_bytes: int
    reads: int
    removals: int
    hits: int
    misses: int
    evictions: int
    uploaded_bytes: int

    def prometheus(self, prefix: str = "sprand_pool") -> str:
        """The text that Prometheus scrapes: a help line, a type line and a sample for each number.

        Args:
            prefix: of the names of all metrics.
        """
        lines = []
        for field in fields(self):
            kind = "gauge" if field.name in GAUGES else "counter"
            name = f"{prefix}_{field.name}" + ("" if kind == "gauge" else "_total")
            lines += [f"# HELP {name} {HELP[field.name]}", f"# TYPE {name} {kind}", f"{name} {getattr(self, field.name)}"]
        return "\n".join(lines) + "\n"
