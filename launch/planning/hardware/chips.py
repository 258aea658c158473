"""What one accelerator chip can do, and where each number was read.

Numbers are those of the vendor's page of the chip, dense, without sparsity. What no
vendor has published is marked "assumed" in `sources`. Peaks are in
`launch/run/chip_peaks.py`, since a run needs them too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from launch.run.chip_peaks import DEVICES_PER_CHIP, PEAK_FLOPS

GIB = 2**30
GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as a roofline needs it.

    Attributes:
        name: as a topology names it.
        kind: "tpu" or "gpu".
        peak_flops: multiply-adds count twice; bfloat16, float16 on V100.
        memory_bytes: capacity of the whole chip, with what the system keeps for itself.
        usable_bytes: TPU: what its compiler gives a program. GPU: all of it, which
            takes XLA_PYTHON_CLIENT_MEM_FRACTION near 1.
        memory_bandwidth: bytes/s between that memory and the cores.
        link_bandwidth: bytes/s one way. TPU: one link to one neighbour. GPU: all of
            NVLink.
        links: TPU: neighbours, 2 per dimension of the torus. GPU: 1.
        slow_bandwidth: bytes/s one way per chip, between slices or nodes.
        node_size: GPUs joined by NVLink; 0 on TPU.
        watts: the mean of a chip at work, or its design power.
        devices: how many devices jax sees in one chip.
        sources: where the numbers were read, and which are assumed.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    peak_flops: float
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    links: int
    slow_bandwidth: float
    node_size: int
    watts: float
    devices: int = 1
    sources: tuple[str, ...] = ()

    def device(self) -> "Chip":
        """Returns the share of one jax device: a mesh counts devices, not chips.

        The links of a torus stay whole: the devices of a chip share them, and the way
        between them is faster than any link.
        """
        n = self.devices
        return dataclasses.replace(
            self,
            peak_flops=self.peak_flops / n,
            memory_bytes=self.memory_bytes // n,
            usable_bytes=self.usable_bytes // n,
            memory_bandwidth=self.memory_bandwidth / n,
            link_bandwidth=self.link_bandwidth / n,
            slow_bandwidth=self.slow_bandwidth / n,
            watts=self.watts / n,
            devices=1,
        )


_TPU = "https://cloud.google.com/tpu/docs/"
_LINKS = "link = bidirectional interconnect per chip / links / 2"
_USABLE = "usable memory: what libtpu 0.0.42.1 says a program may have"


def _tpu(
    name: str,
    *,
    memory_gib: int,
    usable_gib: float,
    bandwidth_gb: float,
    ici_gb: float,
    links: int,
    dcn_gbit: float,
    watts: float,
    sources: tuple[str, ...],
) -> Chip:
    """A TPU by its page: `ici_gb` is GB/s per chip, both ways, over all links."""
    return Chip(
        name=name,
        kind="tpu",
        peak_flops=PEAK_FLOPS[name],
        memory_bytes=memory_gib * GIB,
        usable_bytes=int(usable_gib * GIB),
        memory_bandwidth=bandwidth_gb * GB,
        link_bandwidth=ici_gb * GB / links / 2,
        links=links,
        slow_bandwidth=dcn_gbit / 8 * GB,
        node_size=0,
        watts=watts,
        devices=DEVICES_PER_CHIP.get(name, 1),
        sources=(*sources, _LINKS, _USABLE),
    )


def _gpu(
    name: str,
    *,
    memory_gib: int,
    bandwidth_gb: float,
    nvlink_gb: float,
    fabric_gbit: float,
    watts: float,
    sources: tuple[str, ...],
) -> Chip:
    """A GPU of a node of eight: `nvlink_gb` is GB/s per GPU, both ways."""
    return Chip(
        name=name,
        kind="gpu",
        peak_flops=PEAK_FLOPS[name],
        memory_bytes=memory_gib * GIB,
        usable_bytes=memory_gib * GIB,
        memory_bandwidth=bandwidth_gb * GB,
        link_bandwidth=nvlink_gb * GB / 2,
        links=1,
        slow_bandwidth=fabric_gbit / 8 * GB,
        node_size=8,
        watts=watts,
        sources=sources,
    )


_ALL = (
    _tpu(
        "v4",
        memory_gib=32,
        usable_gib=30.75,
        bandwidth_gb=1228,
        ici_gb=600,
        links=6,
        dcn_gbit=50,
        watts=170,
        sources=(
            f"{_TPU}v4: peak, memory, mean measured power of 90/170/192 W",
            "arXiv:2304.01433, table 4: 1,228 GB/s, 6 links of 50 GB/s each way",
            "assumed: 50 Gbit/s between slices, 200 Gbit/s for a host of 4 chips",
        ),
    ),
    _tpu(
        "v5e",
        memory_gib=16,
        usable_gib=15.75,
        bandwidth_gb=819,
        ici_gb=400,
        links=4,
        dcn_gbit=25,
        watts=200,
        sources=(
            f"{_TPU}v5e: peak, memory (16 GB), 400 GB/s of interconnect; between "
            "slices 6.4 Tbit/s for 256 chips",
            "assumed: 200 W",
        ),
    ),
    _tpu(
        "v5p",
        memory_gib=95,
        usable_gib=95.74,
        bandwidth_gb=2765,
        ici_gb=1200,
        links=6,
        dcn_gbit=50,
        watts=450,
        sources=(
            f"{_TPU}v5p: all but power",
            "assumed: 450 W",
        ),
    ),
    _tpu(
        "v6e",
        memory_gib=32,
        usable_gib=31.25,
        bandwidth_gb=1638,
        ici_gb=800,
        links=4,
        dcn_gbit=100,
        watts=350,
        sources=(
            f"{_TPU}v6e and tpu7x: all but power; 1,638 GB/s, elsewhere 1,640",
            "assumed: 350 W",
        ),
    ),
    _tpu(
        "7x",
        memory_gib=192,
        usable_gib=189.5,
        bandwidth_gb=7380,
        ici_gb=1200,
        links=6,
        dcn_gbit=100,
        watts=900,
        sources=(
            f"{_TPU}tpu7x: all but power; two devices per chip; 4,614 teraflops in "
            "8 bits are not counted on",
            "assumed: 900 W",
        ),
    ),
    _gpu(
        "v100-32g",
        memory_gib=32,
        bandwidth_gb=900,
        nvlink_gb=300,
        fabric_gbit=50,
        watts=300,
        sources=(
            "NVIDIA V100 SXM2 data sheet: float16 peak, memory, NVLink, design power",
            "DGX-1 data sheet: 4 adapters of 100 Gbit/s for 8 GPUs",
        ),
    ),
    _gpu(
        "a100-40g",
        memory_gib=40,
        bandwidth_gb=1555,
        nvlink_gb=600,
        fabric_gbit=200,
        watts=400,
        sources=("NVIDIA A100 SXM data sheet; DGX A100: 200 Gbit/s per GPU",),
    ),
    _gpu(
        "a100-80g",
        memory_gib=80,
        bandwidth_gb=2039,
        nvlink_gb=600,
        fabric_gbit=200,
        watts=400,
        sources=("NVIDIA A100 SXM data sheet; DGX A100: 200 Gbit/s per GPU",),
    ),
    _gpu(
        "h100",
        memory_gib=80,
        bandwidth_gb=3350,
        nvlink_gb=900,
        fabric_gbit=400,
        watts=700,
        sources=("NVIDIA H100 SXM data sheet; DGX H100: 400 Gbit/s per GPU",),
    ),
    _gpu(
        "h200",
        memory_gib=140,  # sold as 141 GB; the driver shows a little over 140 GiB
        bandwidth_gb=4800,
        nvlink_gb=900,
        fabric_gbit=400,
        watts=700,
        sources=("NVIDIA H200 SXM data sheet; DGX H200: 400 Gbit/s per GPU",),
    ),
    _gpu(
        "b200",
        memory_gib=167,  # 180 GB
        bandwidth_gb=8000,
        nvlink_gb=1800,
        fabric_gbit=400,
        watts=1000,
        sources=(
            "NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 14.4 TB/s "
            "of NVLink; peak is a quarter of its 8-bit figure with sparsity",
        ),
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _ALL}
