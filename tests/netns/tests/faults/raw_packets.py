"""Sends, from inside a pod with every network capability, what only a guard outside the pod can stop.

Arguments: label, pod IPv4, target IPv4, pod IPv6, target IPv6, IPv4 address whose link address the frames go to. Each
packet carries LEAKED-BY-<label>-<name>! and its name is printed.

With a file name and a port behind them it goes on in rounds until that file exists: each undoes what the mesh has laid
into the pod, dials the targets' port (0: does not), and sends everything, names beginning with the round's number. What the pod's kernel
refuses to send is printed as refused.
"""

import ctypes
import os
import socket
import struct
import subprocess
import sys
import time

label, source4, target4, source6, target6, next_hop = sys.argv[1:7]
stop, port = sys.argv[7:9] if len(sys.argv) > 7 else (None, None)
MARKER = b""


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp(source, target, family, sport, dport, flags=0x18):
    header = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65535, 0, 0)
    packed = socket.inet_pton(family, source) + socket.inet_pton(family, target)
    length = len(header) + len(MARKER)
    if family == socket.AF_INET:
        pseudo = packed + struct.pack("!BBH", 0, 6, length)
    else:
        pseudo = packed + struct.pack("!IHBB", length, 0, 0, 6)
    value = checksum(pseudo + header + MARKER)
    return header[:16] + struct.pack("!H", value) + header[18:] + MARKER


def ipv4(payload, protocol=6, source=source4, fragment=0, options=b""):
    words = 5 + len(options) // 4
    total = words * 4 + len(payload)
    header = struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, total, 7, fragment, 64, protocol, 0,
                         socket.inet_aton(source), socket.inet_aton(target4)) + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def ipv6(payload, next_header=6, source=source6):
    return struct.pack("!IHBB16s16s", 0x60000000, len(payload), next_header, 64,
                       socket.inet_pton(socket.AF_INET6, source),
                       socket.inet_pton(socket.AF_INET6, target6)) + payload


def neighbour(address):
    # Any datagram makes the kernel ask for the address.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.sendto(b"who", (address, 9))
    for _ in range(100):
        show = ["ip", "neigh", "show", address]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        if "lladdr " in text:
            return bytes.fromhex(text.split("lladdr ")[1].split()[0].replace(":", ""))
        time.sleep(0.02)
    sys.exit(f"{address} does not answer")


def own():
    with open("/sys/class/net/eth0/address") as file:
        return bytes.fromhex(file.read().strip().replace(":", ""))


packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
packet.bind(("eth0", 0))
bypass = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
bypass.setsockopt(263, 20, 1)  # PACKET_QDISC_BYPASS
bypass.bind(("eth0", 0))
raw4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
segment = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
macs = neighbour(next_hop) + own()

v4, v6 = b"\x08\x00", b"\x86\xdd"
destination_options = struct.pack("!BB", 6, 0) + b"\x01\x04\0\0\0\0"


def plain4(sport=4000, dport=80, flags=0x18):
    return tcp(source4, target4, socket.AF_INET, sport, dport, flags)


def plain6():
    return tcp(source6, target6, socket.AF_INET6, 4000, 80)


frames = {
    "plain": lambda: v4 + ipv4(plain4()),
    "syn": lambda: v4 + ipv4(plain4(4001, flags=0x02)),
    "forged-source-port-15008": lambda: v4 + ipv4(plain4(15008)),
    "forged-target-port-15008": lambda: v4 + ipv4(plain4(4002, 15008)),
    "foreign-source": lambda: v4 + ipv4(tcp("10.77.1.77", target4, socket.AF_INET, 4003, 80), source="10.77.1.77"),
    "options": lambda: v4 + ipv4(plain4(), options=b"\x01" * 4),
    "first-fragment": lambda: v4 + ipv4(plain4(), fragment=0x2000),
    "later-fragment": lambda: v4 + ipv4(plain4(), fragment=0x0010),
    "ip-in-ip": lambda: v4 + ipv4(ipv4(plain4()), protocol=4),
    "gre": lambda: v4 + ipv4(b"\0\0\x08\0" + ipv4(plain4()), protocol=47),
    "sctp": lambda: v4 + ipv4(MARKER * 2, protocol=132),
    "vlan": lambda: b"\x81\x00\x00\x05" + v4 + ipv4(plain4()),
    "priority-tag": lambda: b"\x81\x00\x00\x00" + v4 + ipv4(plain4()),
    "qinq": lambda: b"\x88\xa8\x00\x05\x81\x00\x00\x06" + v4 + ipv4(plain4()),
    "ipv6": lambda: v6 + ipv6(plain6()),
    "ipv6-hop-by-hop": lambda: v6 + ipv6(destination_options + plain6(), next_header=0),
    "ipv6-destination-options": lambda: v6 + ipv6(destination_options + plain6(), next_header=60),
    "ipv6-fragment": lambda: v6 + ipv6(struct.pack("!BBHI", 6, 0, 1, 9) + plain6(), next_header=44),
    "ipv6-foreign-source": lambda: v6 + ipv6(plain6(), source="fd77:1::77"),
    "ipv6-in-ipv4": lambda: v4 + ipv4(ipv6(plain6()), protocol=41),
    "experimental-ethertype": lambda: b"\x88\xb5" + MARKER,
}
senders = [
    ("frame", frames, lambda frame: packet.send(macs + frame)),
    ("past-queue", frames, lambda frame: bypass.send(macs + frame)),
    ("raw", {"ipv4": lambda: ipv4(plain4())}, lambda whole: raw4.sendto(whole, (target4, 0))),
    ("raw", {"ipv6": lambda: ipv6(plain6())}, lambda whole: raw6.sendto(whole, (target6, 0))),
    ("raw", {"segment": plain4}, lambda whole: segment.sendto(whole, (target4, 0))),
]


def send_all(prefix, may_be_refused):
    global MARKER
    for way, packets, send in senders:
        for name, build in packets.items():
            name = f"{prefix}{way}-{name}"
            MARKER = f"LEAKED-BY-{label}-{name}!".encode()
            try:
                send(build())
            except OSError as error:
                if not may_be_refused or way in ("frame", "past-queue"):
                    raise
                print(f"refused {name}: {error}")
                continue
            print(name)


def undo():
    # What is not there cannot be removed.
    acts = """ip rule del pref 50; ip -6 rule del pref 50; ip route flush table 133; ip -6 route flush table 133
        tc qdisc del dev eth0 clsact; tc qdisc del dev eth0 root; nft flush ruleset; ip link set eth0 xdp off
        sysctl -qw net.ipv4.tcp_fwmark_accept=0 net.ipv4.fwmark_reflect=0 net.ipv6.fwmark_reflect=0"""
    subprocess.run(["sh", "-c", acts], stderr=subprocess.DEVNULL)
    # BPF_PROG_DETACH of the program that steers inbound connections (BPF_SK_LOOKUP).
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    attributes = struct.pack("IIII", own, 0, 36, 0).ljust(128, b"\0")
    if libc.syscall(321, 9, attributes, 128) == 0:
        print("detached")
    os.close(own)


def dial():
    for target in (target4, target6) if int(port) else ():
        try:
            with socket.create_connection((target, int(port)), timeout=0.3) as connection:
                connection.sendall(b"GET /a-secret-of-the-client HTTP/1.0\r\n\r\n")
                connection.recv(4096)
        except OSError as error:
            print(f"dialling {target}: {error}")


if stop is None:
    send_all("", False)
number = 0
while stop is not None and not os.path.exists(stop):
    number += 1
    print(f"round {number}", flush=True)
    undo()
    dial()
    send_all(f"{number}-", True)
    print(f"done {number}", flush=True)
    time.sleep(0.05)
