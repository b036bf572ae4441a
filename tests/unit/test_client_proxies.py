"""Proxies, exceptions from them and certificates, as the environment names them."""

from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec

import httpx
import pytest

from helpers.faulty_server import FaultyServer, Respond, chat
from helpers.socks_proxy import SocksProxy
from inferlab.client.ping import VLLMPingClient
from inferlab.client.proxies import is_excepted, settle_zone
from inferlab.server import ping_vllm

pytestmark = pytest.mark.network

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in (*NAMES, "REQUEST_METHOD", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with FaultyServer() as running:
        running.answers = [Respond.json(chat())]
        yield running


def ask(base_url: str) -> dict:
    with VLLMPingClient(base_url=base_url, model="m", retry_attempts=1, timeout=20) as client:
        return client.generate("Hi")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_an_http_proxy(server, monkeypatch, name, scheme):
    monkeypatch.setenv(name, f"{scheme}127.0.0.1:{server.port}")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert ask("http://model.invalid/v1")["success"] is True
    assert server.posts[0].path == "http://model.invalid/v1/chat/completions"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_an_exception_from_the_proxy(server, monkeypatch, host):
    """IPv4 in IPv6's clothes is loopback for some versions of Python only, so it is excepted."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "other.invalid ::ffff:0:0/96")
    assert ask(f"http://{host}:{server.port}")["success"] is True
    failed = ask("http://model.invalid")
    assert "cannot connect to http://model.invalid by the proxy of HTTP_PROXY: " in failed["error"]


@pytest.mark.parametrize(
    ("host", "no_proxy", "excepted"),
    [
        ("h.example.com", "example.com", True),
        ("h.example.com", ".example.com", True),
        ("h.example.com", "*.example.com", True),
        ("h.example.com", "H.Example.COM", True),
        ("example.com", ".example.com", True),
        ("notexample.com", "example.com", False),
        ("h.example.com", "other.com, example.com", True),
        ("h.example.com", "other.com example.com", True),
        ("h.example.com", "other.com,\n*", True),
        ("h.example.com", "", False),
        ("h.example.com", ",", False),
        ("h.example.com", "example.com:8000", True),
        ("h.example.com", "example.com:8001", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.4/24", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3:8000", True),
        ("10.1.2.3", "10.1.2.3:80", False),
        ("10.1.2.3", "fd00::/8", False),
        ("[fd00::1]", "fd00::1", True),
        ("[fd00::1]", "fd00:0::0001", True),
        ("[fd00::1]", "[fd00::1]", True),
        ("[fd00::1]", "[fd00::1]:8000", True),
        ("[fd00::1]", "[fd00::1]:80", False),
        ("[fd00::1]", "fd00::/8", True),
        ("[fd00::1]", "localhost,fe80::/10,fd00::/8", True),
        ("[fd00::1]", "fe80::/10", False),
        ("[fe80::1%eth0]", "fe80::/10", True),
    ],
)
def test_no_proxy(host, no_proxy, excepted):
    assert is_excepted(httpx.URL(f"http://{host}:8000/v1"), no_proxy) is excepted


def test_no_proxy_knows_the_port_of_a_scheme():
    assert is_excepted(httpx.URL("https://h"), "h:443")
    assert not is_excepted(httpx.URL("https://h"), "h:80")


@pytest.mark.skipif(find_spec("socksio") is None, reason="needs llm-inference-lab[socks]")
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy(server, monkeypatch, scheme):
    with SocksProxy(server.port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{proxy.address}")
        assert ask("http://model.invalid:8000")["success"] is True
        assert proxy.asked == [("model.invalid", 8000)]


@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
def test_socks_without_its_extra(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, "socks5h://u:secret@127.0.0.1:1080")
    assert ping_vllm.main(["--base-url", "http://model.invalid", "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == (
        f"error: {name}: a socks5h proxy needs an extra; pip install 'llm-inference-lab[socks]'\n"
    )


@pytest.mark.parametrize(
    "address",
    ["socks4://u:secret@h:1", "socks://h:1", "http://", "http://h:secret", "http://[x", "::1:9",
     "http://::1:9"],
)  # fmt: skip
def test_a_proxy_that_is_none(monkeypatch, capsys, address):
    monkeypatch.setenv("HTTPS_PROXY", address)
    assert ping_vllm.main(["--base-url", "https://model.invalid", "--prompt", "Hi"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: HTTPS_PROXY: ")
    assert "it must be scheme://host:port" in error
    assert "secret" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("port", [0, 65536, 99999999])
def test_a_port_that_no_proxy_has(monkeypatch, capsys, port):
    monkeypatch.setenv("http_proxy", f"http://u:secret@h:{port}")
    assert ping_vllm.main(["--host", "model.invalid", "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == (
        f"error: http_proxy: port {port} is not allowed; it must be from 1 to 65535\n"
    )


@pytest.mark.parametrize("content", [None, b"no certificates"])
def test_certificates_that_cannot_be_read(monkeypatch, capsys, tmp_path, content):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert ping_vllm.main(["--base-url", "https://model.invalid", "--prompt", "Hi"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SSL_CERT_FILE: {file} cannot be read as certificates (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_of_certificates_that_is_none(monkeypatch, capsys, tmp_path, there):
    """OpenSSL takes it, and then trusts nobody."""
    folder = tmp_path / "certificates"
    if there:
        folder.write_bytes(b"a file")
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    assert ping_vllm.main(["--base-url", "https://model.invalid", "--prompt", "Hi"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SSL_CERT_DIR: {folder} cannot be read as certificates (")
    assert error.count("\n") == 1


def test_a_folder_of_certificates(monkeypatch, tmp_path):
    for folders in (f"{tmp_path}", f"{tmp_path / 'none'}{os.pathsep}{tmp_path}"):
        monkeypatch.setenv("SSL_CERT_DIR", folders)
        VLLMPingClient(base_url="https://model.invalid").close()


def test_certificates_do_not_matter_without_tls(server, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    assert ask(server.url)["success"] is True


def test_an_ipv6_server(monkeypatch):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = FaultyServer("::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with server:
        server.answers = [Respond.json(chat())]
        assert server.url == f"http://[::1]:{server.port}"
        for arguments in (
            {"host": "::1", "port": server.port},
            {"host": "[::1]", "port": server.port},
            {"host": "::1%lo", "port": server.port},
            {"base_url": f"http://[::1%25lo]:{server.port}"},
            {"base_url": server.url},
        ):
            with VLLMPingClient(**arguments, model="m") as client:
                assert client.base_url == server.url
                assert client.generate("Hi")["success"] is True
                assert server.posts[-1].headers["Host"] == f"[::1]:{server.port}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"host": "fe80::1%eth7", "port": 8000},
        {"host": "[fe80::1%eth7]", "port": 8000},
        {"base_url": "http://[fe80::1%eth7]:8000/v1"},
        {"base_url": "http://[fe80::1%25eth7]:8000/v1"},  # RFC 6874
    ],
)
def test_a_link_local_server_keeps_its_zone_and_does_not_hear_of_it(monkeypatch, arguments):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (7, "eth7")])
    with VLLMPingClient(**arguments, model="m") as client:
        assert client.base_url == "http://[fe80::1%eth7]:8000"
        assert client._connection._http.headers["Host"] == "[fe80::1]:8000"


def test_a_zone_may_be_a_number(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (7, "eth7")])
    assert settle_zone("http://[fe80::1%7]:1") == "http://[fe80::1%7]:1"
    assert settle_zone("http://[fe80::1%257]:1") == "http://[fe80::1%7]:1"
    assert settle_zone("http://u:p%5D@[fd00::1%x]") == "http://u:p%5D@[fd00::1]"


def test_a_zone_that_this_machine_lacks(monkeypatch, capsys):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (7, "eth7")])
    assert ping_vllm.main(["--host", "fe80::1%eth8", "--prompt", "Hi"]) == 2
    why = "fe80::1%eth8: there is no interface eth8; this machine has lo, eth7\n"
    assert capsys.readouterr().err == (
        f"error: base_url 'http://[fe80::1%eth8]:8000' cannot be reached: {why}"
    )
    monkeypatch.setenv("HTTP_PROXY", "http://u:secret@[fe80::1%25eth8]:9")
    assert ping_vllm.main(["--host", "model.invalid", "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == f"error: HTTP_PROXY: {why}"
