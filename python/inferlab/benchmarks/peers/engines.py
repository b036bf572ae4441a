"""Our engine and the peers as processes that are ready to decode, and why others are not."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from inferlab import _C, __version__
from inferlab.benchmarks.outputs import PeerEngine
from inferlab.benchmarks.peers import OURS, PeerFacts
from inferlab.benchmarks.peers.process import PeerFailed, PeerGone, PeerMissing, PeerProcess
from inferlab.config import SpecdecConfig
from inferlab.models import resolve_model_path

logger = logging.getLogger(__name__)


class Engines:
    """The processes, which stay until `close`; one is asked at a time.

    Attributes:
        facts: of all that are wanted, ours first.
        threads: of each.
        about: what has to be known of the target, as our engine tells it; see `ours`.
        loaded: what is known of those that were loaded.
        left_out: those that cannot decode, or no longer, and why.

    Args:
        work: folder for logs and, without ``folder``, for converted models.
        pythons: interpreters by peer; under None that of all others. This one without.
        folder: keeps converted models for the next time.
        timeout_s: for each answer.
    """

    def __init__(
        self,
        facts: Mapping[str, PeerFacts],
        work: Path,
        *,
        pythons: Mapping[str | None, str],
        folder: Path | None,
        timeout_s: float,
    ) -> None:
        self.facts = {**OURS, **facts}
        self.threads = _C.num_threads()
        self.about: dict[str, Any] = {}
        self.loaded: dict[str, PeerEngine] = {}
        self.left_out: dict[str, str] = {}
        self._work = work
        self._pythons = pythons
        self._folder = folder
        self._timeout_s = timeout_s
        self._processes: dict[str, PeerProcess] = {}

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        """See `PeerProcess.call`. A peer that is gone is left out from then on."""
        try:
            return self._processes[name].call(method, self._timeout_s, **arguments)
        except PeerFailed as error:
            logger.debug("%s", error.trace)
            raise
        except PeerGone as error:
            self.left_out[name] = str(error)
            raise

    def start_ours(self, config: SpecdecConfig) -> None:
        """Plain and speculative decoding.

        Raises:
            RuntimeError: the engine cannot be made.
        """
        root = str(Path(__file__).resolve().parents[3])  # where this package lies
        keys = config.model_dump(mode="json", exclude_unset=True)
        for name in OURS:
            self._start(name, {"PYTHONPATH": root})
            self._load(name, config=keys, threads=self.threads)

    def start_peers(self, config: SpecdecConfig, *, context: int, batch: int) -> None:
        """All others that can run; the rest goes to ``left_out``.

        Args:
            context: the longest text, in tokens.
            batch: the most prompts together.
        """
        for name, facts in self.facts.items():
            if name in OURS:
                continue
            try:
                self._start_peer(name, facts, config, context, batch)
            except PeerMissing as error:
                self._leave_out(name, f"{error}: {facts.install}")
            except (PeerFailed, PeerGone, OSError, ValueError) as error:
                self._leave_out(name, str(error))

    def note_memory(self) -> None:
        """Fills in ``peak_rss_mb`` of `loaded`."""
        for name, engine in self.loaded.items():
            engine["peak_rss_mb"] = self._processes[name].peak_rss_mb

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes.values():
            process.close()

    def _start_peer(
        self, name: str, facts: PeerFacts, config: SpecdecConfig, context: int, batch: int
    ) -> None:
        device = self.about["device"].partition(":")[0]
        if device not in facts.devices:
            raise ValueError(f"it is for {' and '.join(facts.devices)}, not for {device}")
        if facts.needs_draft and not self.about["draft_fits"]:
            raise ValueError("needs --draft-mode vanilla and a draft of the target's vocabulary")
        model = _directory(config.base_model)
        if facts.converts:
            model = self._converted(name, model, self.about["dtype"])
        logger.info("%s: loading", facts.title)
        self._start(name)
        self._load(
            name,
            model=model,
            draft=_directory(config.draft_model) if facts.needs_draft else None,
            dtype=self.about["dtype"],
            device=self.about["device"],
            threads=self.threads,
            context=context,
            batch=batch,
            trust_remote_code=config.trust_remote_code,
        )

    def _converted(self, name: str, model: str, dtype: str) -> str:
        """Where the peer's own files of a checkpoint are. They are made in a process of their own,
        whose memory is not the peer's."""
        facts = self.facts[name]
        made_from = _fingerprint(Path(model), dtype)
        folder = (self._folder or self._work) / f"{name}-{made_from}"
        told = folder / "converted"
        if told.is_file():
            return told.read_text(encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        logger.info("%s: converting", facts.title)
        self._start(name)
        try:
            self._versions(name)
            path = self.call(name, "convert", model=model, folder=str(folder), dtype=dtype)
        finally:
            self._processes.pop(name).close()
        told.write_text(path, encoding="utf-8")
        return str(path)

    def _load(self, name: str, **arguments: Any) -> None:
        versions = self._versions(name)
        found = self.call(name, "load", **arguments)
        if name in OURS:
            self.about = found
        self.loaded[name] = {
            "title": self.facts[name].title,
            "versions": versions,
            "format": found["format"],
            "weights_mb": found["weights_mb"],
            "peak_rss_mb": None,
        }

    def _versions(self, name: str) -> dict[str, str]:
        try:
            found: dict[str, str] = self.call(name, "versions")
        except PeerFailed as error:
            install = self.facts[name].install
            raise PeerFailed(
                f"its packages fail to import: {error}; {install}", error.trace
            ) from None
        return found

    def _start(self, name: str, extra: Mapping[str, str] | None = None) -> None:
        python = sys.executable
        if name not in OURS:
            python = self._pythons.get(name) or self._pythons.get(None) or python
        log = self._work / f"{name}.log"
        self._processes[name] = PeerProcess(self.facts[name], python, log, self.threads, extra)

    def _leave_out(self, name: str, why: str) -> None:
        logger.warning("%s is left out: %s", name, why)
        self.left_out[name] = why
        if (process := self._processes.pop(name, None)) is not None:
            process.close()


def _directory(model: str) -> str:
    """Of a checkpoint; a hub id's files come from the cache or the network."""
    found = resolve_model_path(model)
    return str(found if isinstance(found, Path) else snapshot_download(found))


def _fingerprint(model: Path, dtype: str) -> str:
    """Of the files that a conversion is made from."""
    text = [str(model.resolve()), dtype, __version__]
    for file in sorted(model.iterdir()):
        about = file.stat()
        text.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
