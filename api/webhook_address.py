"""Where a webhook may be sent: never into the network that this installation stands in.

The address is resolved for every attempt, checked, and then connected to as it was checked: a name that
resolves differently the second time, or a redirect, leads nowhere.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

import httpx

from domain.errors import InvalidInput

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Target:
    """A checked address, and what the request must say to reach the right host there."""

    url: httpx.URL
    """With the address in place of the name."""
    host: str
    """The Host header."""
    server_name: str
    """For TLS: the name that the certificate must be for."""


async def resolve(url: str, trusted_hosts: str) -> Target:
    """`trusted_hosts` (comma-separated names) may be private and speak plain HTTP.

    Raises InvalidInput(param="url").
    """
    parsed = _parse(url)
    name = parsed.raw_host.decode()
    trusted = name in {one.strip().lower() for one in trusted_hosts.split(",")}
    if parsed.scheme != "https" and not trusted:
        raise _refused("Webhooks are sent over https.")
    port = parsed.port or _PORTS[parsed.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refused(f"'{parsed.host}' does not resolve: {error}.") from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    # One bad address is enough: which one a client would take is the resolver's choice.
    if not trusted and not all(map(is_public, addresses)):
        raise _refused(f"'{parsed.host}' is not a public address.")
    host = parsed.netloc.decode()
    return Target(parsed.copy_with(host=str(addresses[0])), host, name)


def is_public(address: Address) -> bool:
    """Whether the address, and any IPv4 address inside it, is one of the open internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _refused(f"Not a URL: {error}.") from error
    if parsed.scheme not in _PORTS or not parsed.host:
        raise _refused("Not an https URL.")
    if parsed.userinfo or parsed.fragment:
        raise _refused("A webhook's URL has no user name, password or fragment.")
    return parsed


def _refused(message: str) -> InvalidInput:
    return InvalidInput(message, param="url", code="url_not_allowed")
