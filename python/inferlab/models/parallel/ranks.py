"""The processes that a model is spread over: how they meet, and how rank 0 leads them."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed as dist

from inferlab.errors import UsageError, describe_error
from inferlab.machine import launched_as

logger = logging.getLogger(__name__)

ANSWER_S = 120.0
"""A rank that takes no part in an exchange for so long is lost. One whose process has ended is lost
at once, where ranks exchange over sockets; where they do over NCCL, after this time."""
IDLE = timedelta(days=3650)
"""How long ranks wait for the leader to want something."""
FRAME_BYTES = 4096
_HEAD = struct.Struct("<qq")


class RankLostError(RuntimeError):
    """A process of a model that lies on several has ended, or does not answer."""


class Part(Protocol):
    """What a rank holds; its methods are what all ranks can do together."""

    def drop(self, keys: Sequence[int]) -> None:
        """Forgets things that the leader has no use for any more."""
        ...


class Ranks:
    """The ranks, seen from one of them. There is one such group in a process, see `leader`.

    Args:
        part: what this rank holds.
        children: the processes of ranks 1, 2, ..., where the leader started them.
        store: where they met, which must not go before they do.
    """

    def __init__(
        self,
        part: Part,
        children: Sequence[subprocess.Popen[bytes]] = (),
        store: dist.Store | None = None,
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        accelerator = torch.accelerator.current_accelerator()
        self.device = accelerator or torch.device("cpu")
        self._part = part
        self._children = children
        self._store = store
        self._commands = dist.new_group(backend="gloo", timeout=IDLE)
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._dropped: deque[int] = deque()
        self._lost: str | None = None

    def everywhere(self, name: str, *args: Any, confirmed: bool = False) -> Any:
        """Calls a method of `Part` on all ranks; returns what it returns on the leader's.

        Args:
            args: of any kind that can be pickled; tensors of the leader's device come out on each
                rank's own.
            confirmed: waits until all have done it, and an exception of any is the leader's.

        Raises:
            RankLostError: a rank has ended or does not answer, now or before.
            RuntimeError: in a child of `fork`.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process was forked from one whose model lies on several ranks, and cannot "
                "use it; load the model in the child, or start it with multiprocessing's 'spawn'"
            )
        with self._lock, _uninterrupted():
            if self._lost is not None:
                raise RankLostError(self._lost)
            dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
            message = _packed((dropped, name, args, confirmed), self.device)
            try:
                self._tell(*message)
                self._part.drop(dropped)
                done, error, errors = self._do(name, args, confirmed)
            except BaseException as broken:
                self._give_up(broken)
                if _tells_of_loss(broken):
                    raise RankLostError(self._lost) from broken
                raise
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RuntimeError(f"rank {rank} of {self.size}: {text}")
        return done

    def drop(self, key: int) -> None:
        """Has all ranks forget something, with the next thing that they do. For finalizers."""
        self._dropped.append(key)

    def follow(self) -> None:
        """Does what the leader wants until it ends.

        Raises:
            RankLostError: the leader or another rank has gone without a word.
        """
        try:
            while True:
                dropped, name, args, confirmed = self._hear()
                self._part.drop(dropped)
                if name == "end":
                    return
                self._do(name, args, confirmed)
        except RuntimeError as error:
            if _tells_of_loss(error):
                raise RankLostError("another rank has ended or hangs") from error
            raise

    def end(self) -> None:
        """Lets the other ranks go; the leader's last word."""
        if os.getpid() != self._process or not self._lock.acquire(timeout=10.0):
            return  # a step that never ends; the others see when this process has gone
        try:
            if self._lost is None:
                self._lost = "the ranks have been let go"
                with contextlib.suppress(RuntimeError):
                    self._tell(*_packed(((), "end", (), False), self.device))
                self._end_children(patience_s=10.0)
                _leave_group()
        finally:
            self._lock.release()

    def _do(
        self, name: str, args: Sequence[Any], confirmed: bool
    ) -> tuple[Any, Exception | None, list[str | None]]:
        """Result, exception, and what went wrong on each rank, where that is told."""
        if not confirmed:
            return getattr(self._part, name)(*args), None, []
        done, error = None, None
        try:
            done = getattr(self._part, name)(*args)
        except Exception as raised:
            error = raised
        errors: list[str | None] = [None] * self.size
        own = None if error is None else describe_error(error)
        dist.all_gather_object(errors, own, group=self._commands)
        return done, error, errors

    def _tell(self, data: bytes, tensors: torch.Tensor) -> None:
        """One broadcast of a frame, if that holds it all; tensors on a device go by themselves."""
        on_device = self.device.type != "cpu"
        data_bytes, tensor_bytes = len(data), tensors.numel()
        if not on_device:
            data += tensors.numpy().tobytes()
        frame = bytearray(FRAME_BYTES)
        frame[: _HEAD.size] = _HEAD.pack(data_bytes, tensor_bytes)
        first = data[: FRAME_BYTES - _HEAD.size]
        frame[_HEAD.size : _HEAD.size + len(first)] = first
        self._broadcast(torch.frombuffer(frame, dtype=torch.uint8))
        if rest := data[len(first) :]:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        if on_device and tensor_bytes:
            dist.broadcast(tensors, 0)

    def _hear(self) -> Any:
        frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        self._broadcast(frame)
        data = frame.numpy().tobytes()
        data_bytes, tensor_bytes = _HEAD.unpack(data[: _HEAD.size])
        on_device = self.device.type != "cpu"
        missing = data_bytes + (0 if on_device else tensor_bytes) + _HEAD.size - FRAME_BYTES
        if missing > 0:
            rest = torch.empty(missing, dtype=torch.uint8)
            self._broadcast(rest)
            data += rest.numpy().tobytes()
        begin = _HEAD.size + data_bytes
        if on_device:
            tensors = torch.empty(tensor_bytes, dtype=torch.uint8, device=self.device)
            if tensor_bytes:
                dist.broadcast(tensors, 0)
        else:
            tensors = torch.frombuffer(
                bytearray(data[begin : begin + tensor_bytes]) or bytearray(1), dtype=torch.uint8
            )
        return _unpacked(data[_HEAD.size : begin], tensors)

    def _broadcast(self, message: torch.Tensor) -> None:
        dist.broadcast(message, 0, group=self._commands)

    def _give_up(self, broken: BaseException) -> None:
        """Ranks that did not come through something together are of no more use."""
        lost = _tells_of_loss(broken)
        ended = self._end_children(patience_s=1.0 if lost else 0.0)
        if lost:
            who = f"{', '.join(ended)} has ended" if ended else "a rank has ended or hangs"
            self._lost = (
                f"{who}, and with it the model that lies on {self.size} ranks; see what it wrote, "
                "and start again"
            )
        else:
            self._lost = (
                f"the {self.size} ranks of the model were stopped in the middle of a step "
                f"({type(broken).__name__}: {broken}); start again"
            )
        logger.debug("ranks are given up", exc_info=broken)
        _leave_group()

    def _end_children(self, patience_s: float) -> list[str]:
        """Ends the processes that the leader started; returns those that had ended before."""
        deadline = time.monotonic() + patience_s
        ended = []
        for rank, child in enumerate(self._children, start=1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(max(deadline - time.monotonic(), 0.0))
                ended.append(f"rank {rank} ({_ending(code)})")
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        return ended


_ranks: Ranks | None = None
_made: list[Any] = []
"""The process group, if it was made here."""


def leader(size: int, part: Part) -> Ranks:
    """The ranks of this process, which leads them: those of torchrun, or as many as it starts here
    when it first asks for them. On other ranks of torchrun's this does not return: they do as the
    leader says, and end with it.

    Raises:
        UsageError: torchrun started another number, or there are not so many devices.
    """
    global _ranks
    rank, launched = launched_as()
    if _ranks is not None:
        _check_size(_ranks.size, size, "this process leads")
    elif launched > 1:
        _check_size(launched, size, "torchrun started")
        if rank > 0:
            follow(part)
        _join()
        _ranks = Ranks(part)
        atexit.register(_ranks.end)
    else:
        _ranks = _start(size, part)
        atexit.register(_ranks.end)
    return _ranks


def follow(part: Part) -> NoReturn:
    """The whole life of a rank that does not lead; ends the process."""
    for asked_to_end in (signal.SIGINT, signal.SIGTERM):  # the leader says when to end
        signal.signal(asked_to_end, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # the leader says the same
    port = os.environ.get(_PORT)
    store = None if port is None else _store(int(port), is_master=False)
    if store is not None:
        store.set(_there(int(os.environ["RANK"])), "yes")
    _join(store)
    ranks = Ranks(part)
    code = 0
    try:
        ranks.follow()
    except RankLostError as error:
        print(f"rank {ranks.rank} of {ranks.size} ends: {error}", file=sys.stderr)
        code = 1
    _leave_group()
    sys.exit(code)


def _check_size(there: int, asked: int, who: str) -> None:
    if there != asked:
        raise UsageError(
            f"tensor_parallel is {asked}, but {who} {there} processes; ask for {there}, or leave "
            "it out"
        )


def _start(size: int, part: Part) -> Ranks:
    """Starts ranks 1, 2, ... on this machine and meets them."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() < size:
        raise UsageError(
            f"tensor_parallel is {size}, but there are {torch.accelerator.device_count()} devices; "
            "a rank needs one of its own: for several machines use torchrun"
        )
    store = _store(0, is_master=True)
    own = {
        _PORT: str(store.port),
        "WORLD_SIZE": str(size),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(max(torch.get_num_threads() // size, 1)),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "inferlab.models.parallel.follower"],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the leader's
        )
        for rank in range(1, size)
    ]
    try:
        _await_arrivals(store, children)
        _join(store, size)
        return Ranks(part, children, store)
    except BaseException:
        for child in children:
            child.kill()
            child.wait()
        raise


_PORT = "INFERLAB_RANKS_PORT"
"""By which a started rank finds the leader's store, in its environment."""


def _store(port: int, is_master: bool) -> dist.TCPStore:
    """Where ranks on this machine meet; port 0: any that is free."""
    patience = timedelta(seconds=ANSWER_S)
    return dist.TCPStore(
        "127.0.0.1", port, is_master=is_master, timeout=patience, wait_for_workers=False
    )


def _join(store: dist.Store | None = None, size: int | None = None) -> None:
    """Meets the other ranks and takes this one's device.

    Args:
        store: where they meet; None: as torchrun's environment says.
        size: of a leader that started the others, how many there are.
    """
    accelerator = torch.accelerator.current_accelerator()
    backend = "gloo"
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        own = dist.get_default_backend_for_device(accelerator.type)
        backend = f"cpu:gloo,{accelerator.type}:{own}"
    if dist.is_initialized():
        return  # by who uses this package: theirs to end as well
    where: dict[str, Any] = {}
    if store is not None:
        rank = 0 if size is not None else int(os.environ["RANK"])
        where = {"store": store, "rank": rank, "world_size": size or int(os.environ["WORLD_SIZE"])}
    dist.init_process_group(backend, timeout=timedelta(seconds=ANSWER_S), **where)
    _made.append(dist.group.WORLD)


def _there(rank: int) -> str:
    return f"there/{rank}"


def _await_arrivals(store: dist.Store, children: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + ANSWER_S
    for rank, child in enumerate(children, start=1):
        while not store.check([_there(rank)]):
            if child.poll() is not None:
                raise RankLostError(
                    f"rank {rank} could not start ({_ending(child.returncode)}); see what it wrote"
                )
            if time.monotonic() > deadline:
                raise RankLostError(f"rank {rank} did not start within {ANSWER_S:.0f} s")
            time.sleep(0.02)


def _tells_of_loss(error: BaseException) -> bool:
    """Whether an exchange failed, and not what ranks do between exchanges."""
    over_sockets = isinstance(error, RuntimeError) and "gloo" in str(error)
    return isinstance(error, dist.DistError) or over_sockets


def _leave_group() -> None:
    if not _made or not dist.is_initialized():
        return
    _made.clear()
    with contextlib.suppress(RuntimeError, ValueError):
        dist.destroy_process_group()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until all ranks are through; a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread alone
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    waiting: list[Any] = []

    def wait(number: int, frame: Any) -> None:
        if waiting:
            handler(number, frame)
        waiting.append((number, frame))

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if len(waiting) == 1:
        handler(*waiting[0])


class _Pickler(pickle.Pickler):
    """Leaves tensors out, which go as they are."""

    def __init__(self, file: Any, device: torch.device) -> None:
        super().__init__(file, protocol=5)
        self._device = device
        self.tensors: list[torch.Tensor] = []
        self._offset = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        own = value.detach().to(self._device)
        whole = own.clone(memory_format=torch.contiguous_format)
        flat = whole.view(-1).view(torch.uint8)
        missing = -flat.numel() % 8  # every dtype begins where it may
        self.tensors.append(torch.nn.functional.pad(flat, (0, missing)) if missing else flat)
        place = (self._offset, flat.numel(), value.dtype, tuple(value.shape))
        self._offset += flat.numel() + missing
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tensors: torch.Tensor) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> torch.Tensor:
        offset, length, dtype, shape = place
        return self._tensors[offset : offset + length].view(dtype).view(shape)


def _packed(message: Any, device: torch.device) -> tuple[bytes, torch.Tensor]:
    """A message as bytes, and the bytes of its tensors, one after the other, on the device."""
    file = io.BytesIO()
    pickler = _Pickler(file, device)
    pickler.dump(message)
    none = torch.empty(0, dtype=torch.uint8, device=device)
    return file.getvalue(), torch.cat(pickler.tensors or [none])


def _unpacked(data: bytes, tensors: torch.Tensor) -> Any:
    return _Unpickler(io.BytesIO(data), tensors).load()
