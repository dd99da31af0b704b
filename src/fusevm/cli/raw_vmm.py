"""The baseline, without the product: `raw_vmm.py KERNEL INITRAMFS IMAGE OVERLAY [SHELL-TEXT]` prints, as JSON, the
seconds from process start to the agent's HELLO and to its first answer, those of 20 more rounds, and how many of these
the command itself took in the guest."""

import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

QEMU = """qemu-system-x86_64 -M microvm -accel tcg,thread=single,tb-size=96 -cpu max -smp 1 -m 512M -nodefaults
 -no-user-config -nographic -no-reboot -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
 -kernel {kernel} -initrd {initramfs} -serial null -chardev socket,id=agent,fd={fd},server=on,wait=off
 -device virtio-serial-device,max_ports=2 -device virtserialport,chardev=agent,name=fuse.agent -device virtio-rng-device
 -drive if=none,id=image,file={image},format=raw,readonly=on -device virtio-blk-device,drive=image,serial=image
 -drive if=none,id=overlay,file={overlay},format=qcow2,discard=unmap,werror=report,rerror=report
 -device virtio-blk-device,drive=overlay,serial=overlay"""
LINUX = "console=ttyS0 quiet panic=-1 mitigations=off lsm= cryptomgr.notests tsc_early_khz={khz} tsc=reliable "
LINUX += "initcall_blacklist=jent_mod_init init_on_alloc=0 norandmaps"


def frame(kind: int, stream: int, body: bytes = b"") -> bytes:
    head = struct.pack(">3sBII", b"FU\1", kind, stream, len(body))
    return head + struct.pack(">I", zlib.crc32(body, zlib.crc32(head))) + body


def receive(channel: socket.socket, pattern: bytes) -> re.Match[bytes]:
    heard = b""
    while not (found := re.search(pattern, heard, re.DOTALL)):
        heard += channel.recv(65536) or sys.exit("the VMM ended")
    return found


names, shell = ("kernel", "initramfs", "image", "overlay"), sys.argv[5:6]
body = json.dumps({"shell": shell[0]}) if shell else ""
request = f"{'POST /exec' if shell else 'GET /health'} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
khz = round(float(re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())[0]) * 1000)
listener, channel = (socket.socket(socket.AF_UNIX) for _ in range(2))
listener.bind(address := f"\0raw-vmm-{os.getpid()}")
listener.listen()
channel.connect(address)
channel.settimeout(60)
words = QEMU.format(fd=listener.fileno(), **dict(zip(names, sys.argv[1:5], strict=True))).split()
hello = frame(0, 0, os.urandom(16))
channel.sendall(bytes(32784) + hello)
marks, inside = [time.perf_counter()], []
with subprocess.Popen([*words, "-append", LINUX.format(khz=khz)], pass_fds=[listener.fileno()], stdin=-3) as vmm:
    receive(channel, re.escape(hello))
    marks.append(time.perf_counter())
    for number in range(21):
        channel.sendall((b"" if number else frame(1, 1)) + frame(2, 1, request.encode()))
        answer = receive(channel, rb"HTTP/1.1 200 .*}")[0]  # both answers are short and end with a brace
        marks.append(time.perf_counter())
        inside.append(sum(int(ms) / 1000 for ms in re.findall(rb'"duration_ms":(\d+)', answer)))
    vmm.kill()
steps = [later - earlier for earlier, later in itertools.pairwise(marks)]
first = {"hello_s": steps[0], "first_answer_s": steps[0] + steps[1]}
print(json.dumps(first | {"round_s": steps[2:], "inside_s": inside[1:]}))
