"""The virtual clock: requests come, are routed, and replicas decode them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from inferlab.errors import UsageError
from inferlab.simulation.acceptance import Acceptance
from inferlab.simulation.light import LightReplica, Work
from inferlab.simulation.load import Load, Requests
from inferlab.simulation.prices import Prices
from inferlab.simulation.routing import Router, make_router
from inferlab.simulation.scheduled import ScheduledReplica
from inferlab.simulation.setting import Setting
from inferlab.simulation.world import NEVER, Replica, Tally, World

MODELS = ("auto", "real", "light")
FEW = 2000
"""Up to so many requests "auto" plans steps by the engine's own scheduler."""


@dataclass(frozen=True)
class Outcome:
    """What became of a load.

    Attributes:
        model: of the replicas, "real" or "light".
        setting, requests: what was simulated.
        arrived, first, ended: seconds of each request: when it came, and when its client had its
            first and its last token.
        seconds: from the first arrival to the last end.
        tally: of all replicas together.
        busiest_s: of the replica that was busy for longest.
    """

    model: str
    setting: Setting
    requests: Requests
    arrived: np.ndarray
    first: np.ndarray
    ended: np.ndarray
    seconds: float
    tally: Tally
    busiest_s: float


def simulate(
    load: Load,
    setting: Setting,
    acceptance: Acceptance,
    prices: Prices,
    *,
    seed: int = 0,
    model: str = "auto",
    advance: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Runs a load on replicas.

    Args:
        acceptance, prices: what steps give, and take.
        model: "real": steps are planned by `inferlab.scheduler.Scheduler`; "light": they are
            counted (`inferlab.simulation.light`); "auto": "real" for few requests.
        advance: told how many requests have ended since.

    Raises:
        UsageError: a request that does not fit, or an unknown model.
    """
    if model not in MODELS:
        raise UsageError(f"model: {model!r} is unknown; known are {', '.join(MODELS)}")
    requests = Requests.of(load, seed)
    if model == "auto":
        model = "real" if len(requests) <= FEW else "light"
    world = World(requests, setting, acceptance, prices)
    replicas: list[Replica]
    if model == "real":
        replicas = [ScheduledReplica(world) for _ in range(setting.replicas)]
    else:
        work = Work(world)
        replicas = [LightReplica(world, work) for _ in range(setting.replicas)]
    router = make_router(setting, seed)
    latency = prices.overhead.latency_ms / 1e3
    if load.arrivals.rate is not None:
        arrived = _open(requests, world, replicas, router, advance)
    else:
        think = load.arrivals.think_ms / 1e3 + latency
        arrived = _closed(world, replicas, router, load.arrivals.clients, think, advance)
    first, ended = (np.array(times) + latency for times in (world.first, world.ended))
    tally = Tally()
    for replica in replicas:
        tally.add(replica.tally)
    return Outcome(
        model,
        setting,
        requests,
        arrived,
        first,
        ended,
        float(ended.max() - arrived.min()),
        tally,
        max(replica.tally.busy_s for replica in replicas),
    )


def _open(
    requests: Requests,
    world: World,
    replicas: list[Replica],
    router: Router,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Requests come whatever becomes of those before."""
    heap: list[tuple[float, int]] = []
    where: list[int] = [0] * len(requests)
    group = world.group
    for request, now in enumerate(requests.arrives.tolist()):
        if heap and heap[0][0] <= now:
            _fire(heap, replicas, router, where, now, advance)
        _route(heap, replicas, router, where, request, group[request], now)
    _fire(heap, replicas, router, where, NEVER, advance)
    return requests.arrives


def _closed(
    world: World,
    replicas: list[Replica],
    router: Router,
    clients: int,
    think: float,
    advance: Callable[[int], None],
) -> np.ndarray:
    """As many clients ask, each anew when its answer has ended."""
    heap: list[tuple[float, int]] = []
    count = len(world.prompt)
    where, arrived, group = [0] * count, [0.0] * count, world.group
    coming: deque[float] = deque([0.0] * min(clients, count))  # in order: all think as long
    for request in range(count):
        while not coming or (heap and heap[0][0] <= coming[0]):
            until = heap[0][0]
            ended = _fire(heap, replicas, router, where, until, advance)
            coming.extend([until + think] * ended)
        arrived[request] = now = coming.popleft()
        _route(heap, replicas, router, where, request, group[request], now)
    _fire(heap, replicas, router, where, NEVER, advance)
    return np.array(arrived)


def _route(
    heap: list[tuple[float, int]],
    replicas: list[Replica],
    router: Router,
    where: list[int],
    request: int,
    group: int,
    now: float,
) -> None:
    number = where[request] = router.choose(group)
    router.begins(number)
    replica = replicas[number]
    before = replica.at
    replica.add(request, now)
    if replica.at != before:
        heappush(heap, (replica.at, number))


def _fire(
    heap: list[tuple[float, int]],
    replicas: list[Replica],
    router: Router,
    where: list[int],
    until: float,
    advance: Callable[[int], None],
) -> int:
    """All that happens up to a time; how many requests end."""
    ended = 0
    while heap and heap[0][0] <= until:
        at, number = heappop(heap)
        replica = replicas[number]
        if replica.at != at:
            continue  # it was to be so before something came in between
        done = replica.fire()
        for request in done:
            router.ends(where[request])
        if done:
            ended += len(done)
            advance(len(done))
        if replica.at != NEVER:
            heappush(heap, (replica.at, number))
    return ended
