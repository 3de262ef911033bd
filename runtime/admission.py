"""The limits of a scheduler, and which requests can ever be served within them."""

from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits; ValueError for one that no run could keep."""

    block_size: int  # tokens per block
    num_blocks: int  # device blocks
    num_host_blocks: int  # 0: preempt by recomputation only
    max_batch_tokens: int  # tokens computed per step
    max_batch_size: int  # sequences on the device at once
    max_model_len: int  # prompt + output tokens of a sequence
    chunked_prefill: bool = True  # may the prompt of a sequence be spread over several steps?
    prefix_caching: bool = True  # find full blocks of earlier sequences by their content

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 1),
            ("num_blocks", 1),
            ("num_host_blocks", 0),
            ("max_batch_tokens", 1),
            ("max_batch_size", 1),
            ("max_model_len", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    @property
    def max_sequences(self) -> int:
        """Sequences on the device at once, when each may need a token's worth of every step."""
        return min(self.max_batch_size, self.max_batch_tokens)

    def check(self, request: Request) -> None:
        """ValueError, naming value and limit, for a request that could never finish.

        Whatever passes can run to its last token when it has the device to itself, so a sequence
        always ends by its own `max_tokens` before it meets a limit of the cache or the model.
        """
        prompt, params = len(request.prompt_token_ids), request.params
        if prompt < 1:
            raise ValueError("the prompt has 0 tokens; it needs at least 1")
        if (least := min(request.prompt_token_ids)) < 0:
            raise ValueError(f"prompt token {least} is below 0")
        if params.max_tokens < 1:
            raise ValueError(f"max_tokens is {params.max_tokens}; it must be at least 1")
        if params.n < 1:
            raise ValueError(f"n is {params.n}; it must be at least 1")
        if params.n > self.max_sequences:
            raise ValueError(
                f"n is {params.n}; at most {self.max_sequences} sequences run at once"
                f" (max_batch_size {self.max_batch_size}, max_batch_tokens {self.max_batch_tokens})"
            )
        total = prompt + params.max_tokens
        wanted = f"prompt of {prompt} tokens + max_tokens {params.max_tokens}"
        if total > self.max_model_len:
            raise ValueError(f"{wanted} is {total} tokens; the limit is {self.max_model_len}")
        blocks = -(-total // self.block_size)
        if blocks > self.num_blocks:
            raise ValueError(
                f"{wanted} needs {blocks} blocks of {self.block_size} tokens;"
                f" the cache has {self.num_blocks}"
            )
        if not self.chunked_prefill and prompt > self.max_batch_tokens:
            raise ValueError(
                f"prompt of {prompt} tokens exceeds max_batch_tokens {self.max_batch_tokens},"
                " and without chunked prefill it must fit into one step"
            )
