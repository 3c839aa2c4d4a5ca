"""Prints a service account's token (the first argument) as it would be an hour after its end, signed by the cluster's key
(a file, the second argument)."""
import base64
import json
import subprocess
import sys
import time


def encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def decode(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


token, key = sys.argv[1:]
head, body, _ = token.split(".")
header, claims = json.loads(decode(head)), json.loads(decode(body))
assert header["alg"] == "ES256", header
now = int(time.time())
claims.update(iat=now - 7200, nbf=now - 7200, exp=now - 3600)
signed = head.encode() + b"." + encode(json.dumps(claims).encode())
der = subprocess.run(
    ["openssl", "dgst", "-sha256", "-sign", key], input=signed, stdout=subprocess.PIPE, check=True
).stdout
# SEQUENCE of two INTEGERs, each with a leading zero or without leading bytes; a token holds 32 bytes of each.
numbers, at = [], 2
for _ in range(2):
    length = der[at + 1]
    numbers.append(der[at + 2 : at + 2 + length].lstrip(b"\0").rjust(32, b"\0"))
    at += 2 + length
print((signed + b"." + encode(b"".join(numbers))).decode())
