"""Ray Serve's choice of a replica, made by `ranking`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from inferlab.server.replicas.messages import HttpCall
from inferlab.server.replicas.ranking import ranked


class PrefixRouter(RequestRouter):
    """Requests that begin alike go to one replica, while it has not far more to do than others.

    Where a replica has as many requests as it may have, or does not say how many in time, Ray asks
    the next one.
    """

    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 4.0

    def initialize_state(self, **_: Any) -> None:
        self._own: Counter[Any] = Counter()  # requests that this process has at each replica

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        args = pending_request.args if pending_request is not None else ()
        call = args[0] if args and isinstance(args[0], HttpCall) else None
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        key, avoid = (None, frozenset()) if call is None else (call.key, call.avoid)
        return [[by_name[name]] for name in ranked(key, loads, avoid)]

    def _load(self, replica: ReplicaID) -> int:
        """Requests at a replica: as it said lately, others' among them, or this process's own."""
        return max(self.replica_queue_len_cache.get(replica) or 0, self._own[replica])

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._own[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        if self._own[replica_id] > 1:
            self._own[replica_id] -= 1
        else:
            del self._own[replica_id]
