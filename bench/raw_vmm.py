"""The baseline: the same kernel, initramfs, overlay and VMM line as the product, without the product.

Prints one JSON object: seconds from process start to the agent's HELLO, and to the first answer; then `--rounds` more
requests on the same stream. `raw_vmm.py KERNEL INITRAMFS IMAGE OVERLAY [--memory MIB] [--exec TEXT] [--rounds N]`
"""
import argparse, json, os, re, socket, struct, subprocess, tempfile, time, zlib  # noqa: E401

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs=4)
parser.add_argument("--memory", type=int, default=512)
parser.add_argument("--exec", default="")
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--parameters", default="")
args = parser.parse_args()
kernel, initramfs, image, overlay = args.files
khz = round(float(re.search(r"cpu MHz\s*: ([\d.]+)", open("/proc/cpuinfo").read()).group(1)) * 1000)
run = tempfile.mkdtemp(prefix="raw-")
listener, channel = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
listener.bind(f"{run}/agent.sock")
listener.listen()
channel.connect(f"{run}/agent.sock")
channel.settimeout(60)
words = f"""qemu-system-x86_64 -M microvm -accel tcg,thread=single,tb-size=64 -cpu max -smp 1 -m {args.memory}M -nodefaults
 -no-user-config -nographic -no-reboot -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
 -kernel {kernel} -initrd {initramfs} -serial file:{run}/console
 -chardev socket,id=agent,fd={listener.fileno()},server=on,wait=off -device virtio-serial-device,max_ports=2
 -device virtserialport,chardev=agent,name=fuse.agent -device virtio-rng-device
 -drive if=none,id=image,file={image},format=raw,readonly=on -device virtio-blk-device,drive=image,serial=image
 -drive if=none,id=overlay,file={overlay},format=qcow2,cache.no-flush=on,discard=unmap,werror=report,rerror=report
 -device virtio-blk-device,drive=overlay,serial=overlay""".split()
words += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off lsm= cryptomgr.notests tsc_early_khz={khz} tsc=reliable initcall_blacklist=jent_mod_init init_on_alloc=0 {args.parameters}"]
frame = lambda kind, stream, body=b"", head=struct.Struct(">3sBII"): (h := head.pack(b"FU\1", kind, stream, len(body))) + struct.pack(">I", zlib.crc32(body, zlib.crc32(h))) + body  # noqa: E731
hello, buffer = frame(0, 0, os.urandom(16)), b""
request = f"POST /exec HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}" if (body := args.exec and json.dumps({"shell": args.exec})) else "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
channel.sendall(bytes(32784) + hello)
started = time.perf_counter()
vmm = subprocess.Popen(words, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
try:
    while hello not in buffer:
        buffer += channel.recv(65536) or exit("the VMM ended")
    ready = time.perf_counter() - started
    channel.sendall(frame(1, 1))
    rounds, buffer = [], b""
    for _ in range(args.rounds + 1):
        sent = time.perf_counter()
        channel.sendall(frame(2, 1, request.encode()))
        while not (found := re.search(rb"Content-Length: (\d+)\r\n.*?\r\n\r\n", buffer, re.S | re.I)) or len(buffer) < found.end() + int(found.group(1)):
            buffer += channel.recv(65536)[16:]  # an answer this small is one frame
        rounds.append(time.perf_counter() - sent)
        answer, buffer = buffer, b""
    print(json.dumps({"hello_s": ready, "first_answer_s": ready + rounds[0], "round_s": rounds[1:], "answer": answer.decode()}))
finally:
    vmm.kill(), vmm.wait()
    subprocess.run(["rm", "-r", run], check=True)
