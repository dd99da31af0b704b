"""QEMU takes the arguments of the user network."""

import shutil
import socket
import subprocess

import pytest
from namespaces import private_network

from fusevm.host.net.rootless import render_user_network
from fusevm.host.net.terms import Forward
from fusevm.model.network import Transport

QEMU = "qemu-system-x86_64"


@private_network
def test_qemu_takes_the_user_network_closed_and_open():
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    for is_open in (False, True):
        value = render_user_network(
            forwards=[Forward(protocol=Transport.TCP, host_port=40080, port=80)], internet=is_open, user_network=is_open
        )
        machine = ["-M", "microvm", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
        nic = ["-netdev", f"user,id=net0,{value}", "-device", "virtio-net-device,netdev=net0"]
        with subprocess.Popen(
            [QEMU, *machine, *nic], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as qemu:
            assert "QEMU" in qemu.stdout.readline()
            with socket.create_connection(("127.0.0.1", 40080), timeout=60):
                pass
            said, _ = qemu.communicate("info usernet\nquit\n", timeout=120)
        assert qemu.returncode == 0, said
        assert "40080" in said
        assert "10.208.0.2" in said
