"""The roll call: which processes make up this attempt of a run, before they join torch.distributed.

Owns the keys below in torchrun's store and the one answer they lead to. Knows nothing of what ranks
do, nor of who fails later (`neighbours`).

torchrun starts all ranks again after a failure, each node's agent when it sees one, and tells them
how often *it* has done so. Agents may count differently, where one restarted because of the other,
and torch's own prefix in the store is that number: ranks would wait for one another in different
places. So rank 0 calls, anew in each attempt, and goes on with those that answer this very call:

    onecast/call              <call>, written by rank 0
    onecast/answer/<call>/<r> JSON {"nonce", "address", "node", "terms"}, by each other rank, to
                              each new <call>
    onecast/refused/<call>    why a rank cannot take part: a bad option
    onecast/roll/<call>       JSON {"nonces": [...], "addresses": [...]}, {"refused": why} or
                              {"nonces": [...], "missing": who}, by rank 0; it is of the processes
                              that find their own nonces there

What an earlier attempt has left there has no process's nonce of now, and does not matter.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from .config import RankEnvironment
from .terms import disagreement

_PREFIX = "onecast"
_POLL_S = 0.01
_REFUSE_S = 5.0  # for rank 0 to call, before a rank that cannot take part leaves without a word
_VERDICT_S = 5.0  # beyond the time-out, for rank 0 to say who is missing


@dataclass(frozen=True, slots=True)
class Roll:
    """The ranks of one attempt. `store` has keys of this attempt alone."""

    call: str
    addresses: list[str]  # by rank; what each rank gave
    store: Store


class RollCall:
    """One rank's part. RuntimeError, here and below: the store cannot be reached."""

    def __init__(self, environment: RankEnvironment, *, timeout_s: float) -> None:
        self._rank = environment.rank
        self._node = environment.node
        self._world_size = environment.world_size
        self._timeout_s = timeout_s
        self._nonce = secrets.token_hex(8)
        self._base = TCPStore(
            environment.master_addr,
            environment.master_port,
            self._world_size,
            is_master=self._rank == 0 and not environment.agent_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        self._store = PrefixStore(_PREFIX, self._base)

    @contextmanager
    def refuses(self) -> Iterator[None]:
        """A ValueError inside is told to all ranks, which raise it too instead of waiting."""
        try:
            yield
        except ValueError as error:
            self._refuse(str(error))
            raise

    def answer(self, address: str, terms: Mapping[str, str] | None = None) -> Roll:
        """Take part, with an address to be reached at; returns when all ranks do.

        ValueError: a rank refused, or has other `terms` than the others. TimeoutError names the
        ranks that did not come.
        """
        answer = self._call if self._rank == 0 else self._answer
        return answer(address, terms or {})

    def _call(self, address: str, terms: Mapping[str, str]) -> Roll:
        call = self._new_call()
        missing = list(range(1, self._world_size))
        deadline = time.monotonic() + self._timeout_s
        while missing := [r for r in missing if not self._store.check([f"answer/{call}/{r}"])]:
            if self._store.check([f"refused/{call}"]):
                why = self._store.get(f"refused/{call}").decode()
                self._store.set(f"roll/{call}", json.dumps({"refused": why}))
                raise ValueError(why)
            if time.monotonic() > deadline:
                who = name_ranks(missing)
                there = [json.loads(answer)["nonce"] for answer in self._answers(call, missing)]
                self._store.set(f"roll/{call}", json.dumps({"missing": who, "nonces": there}))
                raise TimeoutError(f"waited {self._timeout_s:g} s for {who} in vain")
            time.sleep(_POLL_S)
        answers = [json.loads(answer) for answer in self._answers(call)]
        all_terms = [terms, *(answer.get("terms", {}) for answer in answers)]
        why_not = disagreement(all_terms, [self._node, *(a.get("node", 0) for a in answers)])
        if why_not is not None:
            self._store.set(f"roll/{call}", json.dumps({"refused": why_not}))
            raise ValueError(why_not)
        nonces = [self._nonce, *(answer["nonce"] for answer in answers)]
        addresses = [address, *(answer["address"] for answer in answers)]
        self._store.set(f"roll/{call}", json.dumps({"nonces": nonces, "addresses": addresses}))
        return self._roll(call, addresses)

    def _answer(self, address: str, terms: Mapping[str, str]) -> Roll:
        own = {"nonce": self._nonce, "address": address, "node": self._node, "terms": terms}
        answer = json.dumps(own)
        answered: str | None = None
        deadline = time.monotonic() + self._timeout_s
        while True:
            call = self._called()
            if call is not None and call != answered:
                self._store.set(f"answer/{call}/{self._rank}", answer)
                answered = call
            if answered is not None and self._store.check([f"roll/{answered}"]):
                roll = json.loads(self._store.get(f"roll/{answered}"))
                if "refused" in roll:
                    raise ValueError(roll["refused"])
                if self._nonce in roll["nonces"]:
                    if "missing" in roll:
                        raise TimeoutError(f"rank 0 waited for {roll['missing']} in vain")
                    return self._roll(answered, roll["addresses"])
            if time.monotonic() > deadline + (answered is not None) * _VERDICT_S:
                raise TimeoutError(f"waited {self._timeout_s:g} s for rank 0 in vain")
            time.sleep(_POLL_S * (1 + self._world_size / 64))  # one store answers all of them

    def _answers(self, call: str, missing: Sequence[int] = ()) -> list[bytes]:
        ranks = (rank for rank in range(1, self._world_size) if rank not in missing)
        return [self._store.get(f"answer/{call}/{rank}") for rank in ranks]

    def _new_call(self) -> str:
        call = secrets.token_hex(4)
        self._store.set("call", call)
        return call

    def _called(self) -> str | None:
        return self._store.get("call").decode() if self._store.check(["call"]) else None

    def _refuse(self, why: str) -> None:
        if self._rank == 0:
            self._store.set(f"roll/{self._new_call()}", json.dumps({"refused": why}))
            return
        deadline = time.monotonic() + _REFUSE_S
        while (call := self._called()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if call is not None:
            self._store.set(f"refused/{call}", why)

    def _roll(self, call: str, addresses: list[str]) -> Roll:
        return Roll(call, addresses, PrefixStore(f"{_PREFIX}/run/{call}", self._base))


def name_ranks(ranks: list[int]) -> str:
    """rank 3; ranks 2 and 3; ranks 1, 2 and 3"""
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
