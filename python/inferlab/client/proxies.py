"""What the environment says about the way to a server: proxies, exceptions, certificates."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import urllib.request
from pathlib import Path

import httpx

PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def client_for(
    url: httpx.URL, headers: dict[str, str], timeout: float
) -> tuple[httpx.Client, str | None]:
    """A client for one server, and the variable that names its proxy (None: there is none).

    ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` count in either case, without
    them the system's settings; then ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``.

    A proxy between this machine and itself is never meant. Certificates are read only where TLS is
    spoken.

    Raises:
        ValueError: a proxy or a file of certificates that cannot be used; names the variable.
    """
    proxy = proxy_for(url)
    speaks_tls = url.scheme == "https" or (proxy is not None and proxy.url.scheme == "https")
    context = certificates() if speaks_tls else False
    if proxy is not None and proxy.url.scheme == "https":
        proxy.ssl_context = certificates()
    try:
        client = httpx.Client(
            headers=headers, timeout=timeout, proxy=proxy, verify=context, trust_env=False
        )
        return client, None if proxy is None else proxy_variable(url)
    except ImportError:  # SOCKS is an extra of httpx
        assert proxy is not None
        raise ValueError(
            f"{proxy_variable(url)}: a {proxy.url.scheme} proxy needs an extra; "
            "pip install 'llm-inference-lab[socks]'"
        ) from None


def proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy that the environment names for a server; see `client_for`."""
    if _is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address:
        return None
    if "no" in proxies:
        if is_excepted(url, proxies["no"]):
            return None
    elif urllib.request.proxy_bypass(url.host):  # the system's own list
        return None
    # The address may hold a password: it stands in no message.
    name = proxy_variable(url)
    try:
        address = settle_zone(address)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    allowed = f"it must be scheme://host:port with one of the schemes {', '.join(PROXY_SCHEMES)}"
    try:
        proxy = httpx.URL(address if "://" in address else f"http://{address}")
    except httpx.InvalidURL:
        raise ValueError(f"{name}: is not an address; {allowed}") from None
    host = address.rpartition("@")[2]
    if proxy.scheme not in PROXY_SCHEMES or not proxy.host or host.count("[") != host.count("]"):
        raise ValueError(f"{name}: {proxy.scheme}://{proxy.host} is not allowed; {allowed}")
    check_port(name, proxy)
    return httpx.Proxy(proxy)


def proxy_variable(url: httpx.URL) -> str:
    """The variable that names the proxy, as it is written; "the system's proxy" where none does."""
    for wanted in (f"{url.scheme}_proxy", "all_proxy"):
        for name in (wanted, *os.environ):
            if name.lower() == wanted and os.environ.get(name):
                return name
    return "the system's proxy"


def is_excepted(url: httpx.URL, no_proxy: str) -> bool:
    """Whether ``NO_PROXY`` excepts the server.

    Entries are parted by commas or blanks: ``*``; a host name, which means its subdomains, too,
    with or without a dot or ``*.`` in front; an IP address, IPv6 with or without brackets; a
    network, ``10.0.0.0/8`` or ``fd00::/8``. Behind a name or address, ``:port`` may stand.
    """
    host = _address(url.host)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    for entry in re.split(r"[,\s]+", no_proxy.strip().lower()):
        if entry == "*":
            return True
        if _network_has(entry.strip("[]"), host):
            return True
        name, _, given = entry.rpartition(":")
        if name and given.isdigit():
            if int(given) != port:
                continue
            entry = name
        if _network_has(entry.strip("[]"), host):
            return True
        name = entry.removeprefix("*").lstrip(".").rstrip(".")
        if name and f".{url.host.lower().rstrip('.')}".endswith(f".{name}"):
            return True
    return False


def check_port(name: str, url: httpx.URL) -> None:
    """Raises ValueError where the address has a port that no server has."""
    if url.port is not None and not 1 <= url.port <= 65535:
        raise ValueError(f"{name}: port {url.port} is not allowed; it must be from 1 to 65535")


def settle_zone(address: str) -> str:
    """``address`` with the zone of an IPv6 host as the system's resolver takes it.

    A zone says by which interface a link-local host is reached, ``[fe80::1%eth0]``, or
    ``[fe80::1%25eth0]`` as RFC 6874 writes it in addresses. Behind other hosts, ``[::1%lo]``, it
    has no meaning (RFC 4007) and is taken off.

    Raises:
        ValueError: this machine has no such interface.
    """
    found = re.search(r"\[([0-9A-Fa-f:.]+)%(?:25(?=[^\]]))?([^\]]+)\]", address)
    host = _address(found[1]) if found else None
    if found is None or host is None:
        return address
    zone = ""
    if host.is_link_local:
        interfaces = dict(socket.if_nameindex())
        zone = f"%{found[2]}"
        if found[2] not in interfaces.values() and _number(found[2]) not in interfaces:
            raise ValueError(
                f"{found[1]}{zone}: there is no interface {found[2]}; this machine has "
                + ", ".join(interfaces.values())
            )
    return f"{address[: found.start()]}[{found[1]}{zone}]{address[found.end() :]}"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _network_has(network: str, host: ipaddress.IPv4Address | ipaddress.IPv6Address | None) -> bool:
    if host is None:
        return False
    try:
        return host in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that ``host`` is, without a zone; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def certificates() -> ssl.SSLContext:
    """What servers' certificates are verified by. Raises ValueError naming the variable."""
    name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
    try:
        if name == "SSL_CERT_DIR" and os.environ.get(name):
            # A list. OpenSSL passes over folders that are not there, be it all of them.
            folders = os.environ[name].split(os.pathsep)
            if not any(Path(folder).is_dir() for folder in folders):
                os.listdir(folders[0])
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"{name}: {os.environ.get(name)} cannot be read as certificates "
            f"({error.strerror or error}); correct it or unset it"
        ) from None
