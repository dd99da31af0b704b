"""The host daemon's configuration from settings."""

from collections.abc import Mapping

from fusevm.cli.places import find_places
from fusevm.cli.settings import Loaded
from fusevm.host.config import HostConfig


def host_config(loaded: Loaded, environ: Mapping[str, str], data: str | None = None) -> HostConfig:
    """Build it. Without a data root of its own the daemon uses the places of `fuse up`. Raises BadSetting."""
    places = find_places(data, environ)
    given = loaded["data_root"]
    return HostConfig(
        data_root=given or places.host,
        artefact_root=loaded["artefact_root"] or (None if given else places.data),
        run_dir=loaded["run_dir"],
        listen=loaded["host_listen"],
        plain_http=loaded["plain_http"],
        driver=loaded["driver"],
        firecracker_binary=loaded["firecracker_binary"],
        jailer_binary=loaded["jailer_binary"],
        kernel=loaded["kernel"],
        network_range=loaded["network_range"],
        egress_interface=loaded["egress_interface"],
        published_ports=loaded["published_ports"],
        instance=loaded["instance"],
        login_ca=loaded["login_ca"],
        sweep_interval_s=loaded["sweep_interval_s"],
        user_network=loaded["user_network"],
        disk_bytes_per_s=loaded["disk_bytes_per_s"],
        disk_ops_per_s=loaded["disk_ops_per_s"],
        max_machines=loaded["max_machines"],
        cpu_ratio=loaded["cpu_ratio"],
        disk_ratio=loaded["disk_ratio"],
        ram_reserve_mib=loaded["ram_reserve_mib"],
        cpu_reserve=loaded["cpu_reserve"],
        disk_reserve_bytes=loaded["disk_reserve_bytes"],
        image_max_bytes=loaded["max_image_bytes"],
        image_high_percent=loaded["image_high_percent"],
        image_low_percent=loaded["image_low_percent"],
        artifact_networks=loaded["artifact_networks"],
    )
