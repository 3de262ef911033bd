"""The session of a rank whose program knows nothing of sessions, from its first group to its end.

Owns how that one session starts, what tells its steps, and its end. Who the rank is comes from
`auto_identity`, what a step is from `auto_steps`.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import sys
import threading

from .auto_hook import say
from .auto_identity import Identity
from .auto_steps import CollectiveTurns, OptimizerTurns, StepClock, Turns
from .current import current_session, opened_for_others
from .ddp_hook import hook_ddp, unhook_ddp
from .intercept import Recorder
from .ring import RingWriter
from .run_directory import shared_run_dir
from .session import start_session
from .settings import TelemetrySettings

CLOSE_TIMEOUT_S = 5.0  # what the end of a program may be late, at most
_LOOK_AGAIN_S = 2.0


class AutomaticSession:
    """The session of one rank, what tells its steps, and its end."""

    def __init__(self, identity: Identity, settings: TelemetrySettings, group_name: str) -> None:
        rule, _, every = settings.auto_step.partition(":")
        counting: list[CollectiveTurns] = []

        def recorder(ring: RingWriter) -> Recorder:
            if rule != "collectives":
                return ring
            counting.append(CollectiveTurns(ring, group_name, int(every)))
            return counting[0]

        self._pid = os.getpid()
        self._session = session = start_session(
            rank=identity.rank,
            local_rank=identity.local_rank,
            world_size=identity.world_size,
            local_world_size=identity.local_world_size,
            engine_id=identity.engine_id,
            settings=settings,
            run_dir=shared_run_dir(identity.key),
            recorder=recorder,
            any_port=True,
        )
        self._ddp_hook = session.recording and settings.ddp_hook
        self._clock: StepClock | None = None
        self._turns: Turns | None = None
        self._ended = threading.Event()
        if session.recording:
            opened_for_others(session)
            if self._ddp_hook:
                hook_ddp()
            if rule == "optimizer":
                self._turns = OptimizerTurns(session.phase("optimizer.step"))
            elif rule == "collectives":
                self._turns = counting[0]
            if self._turns is not None:
                self._clock = StepClock(session.step(0), lambda: session.num_records)
                self._turns.start(self._clock)
                session.own_step = self._stop_steps
            threading.Thread(target=self._look_after, name="onecast", daemon=True).start()
        atexit.register(self._at_exit)
        self._finalizer: multiprocessing.util.Finalize[None] | None = None
        if multiprocessing.parent_process() is not None:  # a forked one never comes to atexit
            self._finalizer = multiprocessing.util.Finalize(None, self._at_exit, exitpriority=0)
        if identity.local_rank == 0 and session.metrics_url is not None:
            ranks = (
                f"{identity.local_world_size} ranks" if identity.local_world_size > 1 else "1 rank"
            )
            say(f"metrics of {ranks} at {session.metrics_url}")

    def close(self, *, wait: bool) -> None:
        atexit.unregister(self._at_exit)
        if self._finalizer is not None:
            self._finalizer.cancel()
        self._ended.set()
        self._stop_steps()
        if self._ddp_hook:
            self._ddp_hook = False
            unhook_ddp()
        self._session.close(wait=wait)

    def _stop_steps(self) -> None:
        """From here on the program says what a step is, or nobody does."""
        self._session.own_step = None
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.stop()
        if self._clock is not None:
            self._clock.stop()

    def _look_after(self) -> None:
        """What is else done at the end of a step, for programs in which none ends."""
        while not self._ended.wait(_LOOK_AGAIN_S):
            if current_session() is not self._session:
                self._stop_steps()
                return
            self._session.sample_coverage()
            if self._clock is not None:
                self._clock.give_up_long()

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the rank
        try:
            # After an uncaught error the other ranks may never close: nobody waits for them.
            self.close(wait=not hasattr(sys, "last_value"))
        except Exception as error:
            say(f"the end was not recorded: {type(error).__name__}: {error}")
