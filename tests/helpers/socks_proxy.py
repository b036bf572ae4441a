"""A SOCKS5 proxy (RFC 1928) on the loopback interface that leads every connection to one server."""

from __future__ import annotations

import socket
import socketserver
import threading

from helpers.serving import Serving


class SocksProxy(Serving):
    """``asked`` holds the (host, port) of each connection; all go to ``port`` of this machine."""

    def __init__(self, port: int) -> None:
        self.asked: list[tuple[str, int]] = []
        asked = self.asked

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                _, count = self.rfile.read(2)
                self.rfile.read(count)
                self.wfile.write(b"\x05\x00")  # no authentication
                _, _, _, kind = self.rfile.read(4)
                assert kind == 3, "a host name, for the proxy to look up"
                host = self.rfile.read(self.rfile.read(1)[0]).decode()
                asked.append((host, int.from_bytes(self.rfile.read(2), "big")))
                self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
                with socket.create_connection(("127.0.0.1", port)) as server:
                    back = threading.Thread(target=_copy, args=(server, self.connection))
                    back.start()
                    _copy(self.connection, server)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side has gone
