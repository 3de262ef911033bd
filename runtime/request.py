"""Requests and the sequences that answer them.

Owns what a request asks for (`SamplingParams`), and the state of each of its `n` choices
(`Sequence`). Knows nothing of blocks beyond holding a block table, and nothing of torch.
"""

import enum
from dataclasses import dataclass, field

# Stands in `Sequence.token_ids`, as the last of them, for a token that is being drawn: so the next
# step can be planned before it is known.
PLACEHOLDER = -1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Choice k of a request with seed s draws as if it were a request of its own with seed s + k,
    so `n = 4, seed = 7` equals four requests with seeds 7, 8, 9 and 10.
    """

    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    seed: int = 0  # the front end draws one where the user gave none
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely ones


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token; log-probabilities are natural, of the unscaled distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class Status(enum.Enum):
    WAITING = "waiting"  # holds no block: new, or preempted for recomputation
    FORKING = "forking"  # waits until sequence 0 of its request has its prompt in the cache
    RUNNING = "running"  # holds device blocks
    SWAPPED = "swapped"  # holds host blocks
    ENDING = "ending"  # holds nothing: the last token that it may have is being drawn
    FINISHED = "finished"  # holds nothing


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: its tokens so far, and where their keys and values lie."""

    request: "Request"
    index: int  # choice number within the request, 0 .. n - 1
    token_ids: list[int]  # prompt, then output, then perhaps a PLACEHOLDER
    status: Status = Status.WAITING
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)  # device block numbers
    host_block_table: list[int] = field(default_factory=list)  # while SWAPPED
    output: list[SampledToken] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "abort"
    num_swaps: int = 0  # times swapped out
    num_recomputes: int = 0  # times preempted without room in host memory
    arrival: int = 0  # place in the order of arrival; the scheduler gives it
    num_cached_tokens: int = 0  # of the prompt, found in the cache when it was first admitted
    # The scheduler's notes.
    block_keys: list[bytes] = field(default_factory=list)  # of its leading full blocks
    tokens_at_entry: int = 0  # how many it had when it came to the device
    run_from: int = 0  # first step that may compute it: swaps get a step's time
    due: int = -1  # step in which it needs its next block, as a decode
    # Of its request, and asked in every step.
    num_prompt: int = field(init=False)
    max_num_tokens: int = field(init=False)  # prompt and output
    stop_token_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.params
        self.num_prompt = len(self.request.prompt_token_ids)
        self.max_num_tokens = self.num_prompt + params.max_tokens
        self.stop_token_ids = params.stop_token_ids

    @property
    def num_preemptions(self) -> int:
        return self.num_swaps + self.num_recomputes

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TraceHeaders:
    """The W3C trace context of whoever made a request, as it was given."""

    traceparent: str
    tracestate: str | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and its `params.n` sequences."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)
    trace: TraceHeaders | None = None
    number: int = -1  # in the order of arrival at the engine, which gives it

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences = [
                Sequence(self, index, list(self.prompt_token_ids)) for index in range(self.params.n)
            ]

    @property
    def finished(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)
