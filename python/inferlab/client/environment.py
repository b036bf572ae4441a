"""What the environment says about the way to a server: proxies, exceptions, certificates."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import urllib.request

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
    proxy = None if _is_loopback(url.host) else _proxy_for(url)
    speaks_tls = url.scheme == "https" or (proxy is not None and proxy.url.scheme == "https")
    context = _certificates() if speaks_tls else False
    if proxy is not None and proxy.url.scheme == "https":
        proxy.ssl_context = _certificates()
    try:
        client = httpx.Client(
            headers=headers, timeout=timeout, proxy=proxy, verify=context, trust_env=False
        )
        return client, None if proxy is None else _proxy_variable(url)
    except ImportError:  # SOCKS is an extra of httpx
        assert proxy is not None
        raise ValueError(
            f"{_proxy_variable(url)}: a {proxy.url.scheme} proxy needs an extra; "
            "pip install 'llm-inference-lab[socks]'"
        ) from None


def _proxy_for(url: httpx.URL) -> httpx.Proxy | None:
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
    name = _proxy_variable(url)
    allowed = f"it must be scheme://host:port with one of the schemes {', '.join(PROXY_SCHEMES)}"
    try:
        proxy = httpx.URL(address if "://" in address else f"http://{address}")
    except httpx.InvalidURL:
        raise ValueError(f"{name}: is not an address; {allowed}") from None
    host = address.rpartition("@")[2]
    if proxy.scheme not in PROXY_SCHEMES or not proxy.host or host.count("[") != host.count("]"):
        raise ValueError(f"{name}: {proxy.scheme}://{proxy.host} is not allowed; {allowed}")
    return httpx.Proxy(proxy)


def _proxy_variable(url: httpx.URL) -> str:
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


def _certificates() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise ValueError(
            f"{name}: {os.environ.get(name)} cannot be read as certificates "
            f"({error.strerror or error}); correct it or unset it"
        ) from None
