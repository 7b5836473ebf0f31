"""Trees of files as the kernel shows them under /sys: AMD cards by amdgpu and kfd, network ports by infiniband.

The real collectors read them under their `root`. Values are those of simulated cards and of `NicPort`, in the
kernel's units and spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from lens.collectors.simulated.device import SimDevice

WAIT_TICK_S = 4e-9
"""Length of a tick of the simulated ``port_xmit_wait``; an assumption, real ones differ by maker."""
PACKET_BYTES = 4096
_MICRO = 1e6
_MEMORY_IS_HOTTER_CELSIUS = 6
_TRANSFERS = {4: "16.0 GT/s PCIe", 5: "32.0 GT/s PCIe", 6: "64.0 GT/s PCIe"}
_FIRST_RENDER_NODE = 128
_FIRST_KFD_ID = 1000


class Tree:
    """Files under a root, written when their text has changed.

    Args:
        root: where ``sys`` hangs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._texts: dict[str, str] = {}

    def put(self, folder: str, files: Mapping[str, object]) -> None:
        """Write files of one folder; a value of None takes the file away."""
        for name, value in files.items():
            path = f"{folder}/{name}"
            text = None if value is None else f"{value}\n"
            if self._texts.get(path) == text:
                continue
            target = self.root / path
            if text is None:
                target.unlink(missing_ok=True)
                del self._texts[path]
                continue
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            target.write_text(text)
            self._texts[path] = text


def write_amdgpu(tree: Tree, cards: Sequence[SimDevice]) -> None:
    """The files of these cards as they are now; those of a lost card go."""
    for card in cards:
        folder = f"sys/class/drm/card{card.index}/device"
        files = {**_identity_files(card), **_amdgpu_files(card)}
        tree.put(folder, dict.fromkeys(files) if card.faults.lost else files)
        tree.put(f"{folder}/hwmon/hwmon{card.index}", _hwmon_files(card))
        _write_kfd(tree, card)


def _identity_files(card: SimDevice) -> dict[str, object]:
    profile = card.profile
    return {
        "vendor": "0x1002",
        "device": "0x0000",
        "product_name": profile.model,
        "unique_id": card.uuid.removeprefix("GPU-"),
        "uevent": f"DRIVER=amdgpu\nPCI_SLOT_NAME={_pci(card)}",
        "max_link_speed": _TRANSFERS[profile.pcie_generation],
        "max_link_width": profile.pcie_width,
    }


def _amdgpu_files(card: SimDevice) -> dict[str, object]:
    profile, faults = card.profile, card.faults
    levels = (profile.idle_mhz, card.clock_mhz, profile.max_mhz)
    clocks = [f"{place}: {int(clock)}Mhz" for place, clock in enumerate(levels)]
    return {
        "gpu_busy_percent": round(100 * card.utilization),
        "mem_busy_percent": round(100 * card.dram),
        "mem_info_vram_total": profile.memory_bytes,
        "mem_info_vram_used": card.memory_used,
        "mem_info_gtt_used": 0,
        "pp_dpm_sclk": f"{clocks[0]}\n{clocks[1]} *\n{clocks[2]}",
        "pp_dpm_mclk": f"0: {int(profile.memory_mhz)}Mhz *",
        "current_link_speed": _TRANSFERS[profile.pcie_generation],
        "current_link_width": faults.pcie_width or profile.pcie_width,
        "pcie_replay_count": 0,
        "ras/umc_err_count": f"ue: {faults.ecc_uncorrected}\nce: {faults.ecc_corrected}",
    }


def _hwmon_files(card: SimDevice) -> dict[str, object]:
    cap = min(card.profile.board_w, card.faults.power_cap_w or card.profile.board_w)
    return {
        "name": "amdgpu",
        "power1_input": int(card.power_w * _MICRO),
        "power1_cap": int(cap * _MICRO),
        "temp2_label": "junction",
        "temp2_input": int(card.celsius * 1000),
        "temp2_crit": int(card.profile.slowdown_celsius * 1000),
        "temp3_label": "mem",
        "temp3_input": int((card.celsius + _MEMORY_IS_HOTTER_CELSIUS) * 1000),
    }


def _write_kfd(tree: Tree, card: SimDevice) -> None:
    """The card as compute node, and the memory each process holds on it."""
    identity, bus = _FIRST_KFD_ID + card.index, card.index + 1
    properties = f"location_id {bus << 8}\ndomain 0\ndrm_render_minor {_FIRST_RENDER_NODE + card.index}"
    node = f"sys/class/kfd/kfd/topology/nodes/{card.index + 1}"
    tree.put(node, {"gpu_id": identity, "properties": properties})
    for pid, size in card.processes:
        tree.put(f"sys/class/kfd/kfd/proc/{pid}", {f"vram_{identity}": size})


def _pci(card: SimDevice) -> str:
    return f"0000:{card.index + 1:02x}:00.0"


@dataclass(frozen=True)
class NicModel:
    """One kind of network card: how its driver spells things."""

    driver: str
    """Its devices are called by it: ``mlx5_0``."""
    vendor_id: str
    link_layer: str
    rate: str
    """As the file ``rate`` says it."""
    speed: float
    """By/s in one direction."""
    byte_files: tuple[str, str]
    word: int
    """Bytes that one count stands for."""
    congestion_file: str
    retransmit_file: str


NICS: Mapping[str, NicModel] = MappingProxyType(
    {
        "nvidia": NicModel(
            driver="mlx5",
            vendor_id="0x15b3",
            link_layer="InfiniBand",
            rate="400 Gb/sec (4X NDR)",
            speed=50e9,
            byte_files=("counters/port_xmit_data", "counters/port_rcv_data"),
            word=4,
            congestion_file="rp_cnp_handled",
            retransmit_file="packet_seq_err",
        ),
        "amd": NicModel(
            driver="ionic",
            vendor_id="0x1dd8",
            link_layer="Ethernet",
            rate="400 Gb/sec (4X NDR)",
            speed=50e9,
            byte_files=("hw_counters/tx_rdma_ucast_bytes", "hw_counters/rx_rdma_ucast_bytes"),
            word=1,
            congestion_file="rx_rdma_cnp_pkts",
            retransmit_file="tx_rdma_retx_pkts",
        ),
    }
)
"""The network card that goes with a maker's accelerators."""


@dataclass
class NicPort:
    """Port 1 of one network card: its counters, in SI units."""

    model: NicModel
    index: int
    transmit: float = 0.0
    receive: float = 0.0
    wait_s: float = 0.0
    congestion_notices: float = 0.0
    retransmits: int = 0
    symbol_errors: int = 0
    link_downed: int = 0
    up: bool = True
    guid: str = field(default="")

    @property
    def name(self) -> str:
        """How the kernel calls the device."""
        return f"{self.model.driver}_{self.index}"


def write_infiniband(tree: Tree, ports: Sequence[NicPort]) -> None:
    """The files of these ports as they are now."""
    for port in ports:
        device = f"sys/class/infiniband/{port.name}"
        tree.put(device, {"node_guid": port.guid, "hca_type": port.model.driver, "fw_ver": "simulated"})
        tree.put(f"{device}/device", {"vendor": port.model.vendor_id})
        tree.put(f"{device}/ports/1", _port_files(port))


def _port_files(port: NicPort) -> dict[str, object]:
    model = port.model
    sizes = dict(zip(model.byte_files, (port.transmit, port.receive), strict=True))
    return {
        "state": "4: ACTIVE" if port.up else "1: DOWN",
        "phys_state": "5: LinkUp" if port.up else "3: Disabled",
        "rate": model.rate,
        "link_layer": model.link_layer,
        **{name: int(size) // model.word for name, size in sizes.items()},
        "counters/port_xmit_packets": int(port.transmit / PACKET_BYTES),
        "counters/port_rcv_packets": int(port.receive / PACKET_BYTES),
        "counters/port_xmit_wait": int(port.wait_s / WAIT_TICK_S),
        "counters/port_xmit_discards": 0,
        "counters/symbol_error": port.symbol_errors,
        "counters/link_error_recovery": port.link_downed,
        "counters/link_downed": port.link_downed,
        "hw_counters/lifespan": 10,
        f"hw_counters/{model.congestion_file}": int(port.congestion_notices),
        f"hw_counters/{model.retransmit_file}": port.retransmits,
    }
