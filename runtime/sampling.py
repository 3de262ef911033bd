"""Choosing the next token of every sequence from its logits.

Owns greedy choice, temperature, top-k, top-p and log-probabilities. A draw depends on the logits,
the seed (of the request, plus the choice's index) and the number of tokens generated so far, and on
nothing else. So it is the same in any batch, after a preemption, and in a run that resumes another.
What is remembered from step to step is only worked out earlier, or once.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .request import SampledToken, Sequence
from .uniforms import Uniforms


class Sampler:
    """Draws one token per sequence."""

    def __init__(self) -> None:
        self._batch = _Batch([], torch.device("cpu"))
        self._tokens = _PlainTokens()

    def sample(
        self, logits: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> list[SampledToken]:
        """Sequence i draws from row `rows[i]` of `logits` (float32 `[R, vocab]`).

        A token is kept by top-k if fewer than k are more likely, and by top-p if those more likely
        hold less than p together: equals are kept or dropped together. Log-probabilities are of
        the logits as they are, before temperature and filters. Generated tokens are those in
        `Sequence.output`.

        Raises FloatingPointError, naming the request, where logits are not finite.
        """
        if not sequences:
            return []
        batch = self._batch
        if sequences != batch.sequences or logits.device != batch.device:
            batch = self._batch = _Batch(sequences, logits.device)
        with torch.inference_mode():
            if rows != list(range(logits.shape[0])):
                logits = logits[torch.tensor(rows, device=logits.device)]
            tokens, peaks = _most_likely(logits)
            _check_finite(peaks, sequences)
            if len(batch.drawn) == len(sequences):
                tokens = _draw(logits, peaks, batch)
            elif batch.drawn:
                index = torch.tensor(batch.drawn, device=logits.device)
                tokens[index] = _draw(logits[index], peaks[index], batch)
            sampled = [*map(self._tokens.__getitem__, tokens.tolist())]
            if batch.logprobs:
                _add_logprobs(sampled, logits, batch.logprobs)
        return sampled


class _PlainTokens(dict[int, SampledToken]):
    """Tokens without log-probabilities, one object for each id: to make one takes 300 ns."""

    def __missing__(self, token_id: int) -> SampledToken:
        token = self[token_id] = SampledToken(token_id)
        return token


class _Batch:
    """What the parameters of these sequences come to, for as long as they are sampled together."""

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        self.sequences = sequences.copy()
        self.device = device
        params = [sequence.request.params for sequence in sequences]
        self.drawn = [i for i, p in enumerate(params) if p.temperature > 0]  # the others: greedy
        self.logprobs = {i: p.logprobs for i, p in enumerate(params) if p.logprobs is not None}
        # Of those drawn:
        params = [params[i] for i in self.drawn]
        self._drawn_sequences = [sequences[i] for i in self.drawn]
        self._uniforms = Uniforms([s.request.params.seed + s.index for s in self._drawn_sequences])
        self.temperatures: Tensor | None = None  # float64 [n, 1]; None: 1 throughout
        if any(p.temperature != 1 for p in params):
            temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64)
            self.temperatures = temperatures.to(device)[:, None]
        self.filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
        self.top_k = [params[i].top_k for i in self.filtered]
        self.top_p = [params[i].top_p for i in self.filtered]

    def shares(self) -> Tensor:
        """A uniform number in [0, 1) for each drawn sequence, float64 `[n, 1]`."""
        counts = [len(sequence.output) for sequence in self._drawn_sequences]
        return torch.from_numpy(self._uniforms.at(counts)).to(self.device)[:, None]


def _most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of the greatest logit, int64 `[n]`, and that logit, `[n, 1]`.

    NaN counts as the greatest.
    """
    if logits.is_cuda:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens.squeeze(1), logits.gather(1, tokens)
    array = logits.numpy()
    found = array.argmax(-1)  # 13 times faster than torch's on a CPU
    return torch.from_numpy(found), torch.from_numpy(array[np.arange(len(found)), found])[:, None]


def _check_finite(peaks: Tensor, sequences: list[Sequence]) -> None:
    if math.isfinite(peaks.sum(dtype=torch.float64).item()):  # which float32 cannot overflow
        return
    number = int(np.isfinite(peaks.cpu().numpy()).argmin())
    sequence = sequences[number]
    raise FloatingPointError(
        f"the logits of request {sequence.request.request_id!r} at token "
        f"{sequence.num_prompt + len(sequence.output)} are not finite "
        f"(maximum {peaks[number].item()})"
    )


def _draw(logits: Tensor, peaks: Tensor, batch: _Batch) -> Tensor:
    """One token per row: the first whose cumulated weight exceeds a uniform share of the total.

    All of it is done row by row: a row's token does not depend on the other rows.
    """
    weights = _weights(logits, peaks, batch.temperatures)
    if batch.filtered:
        limits = torch.full_like(peaks, -torch.inf)
        index = torch.tensor(batch.filtered, device=logits.device)
        temperatures = batch.temperatures
        limits[index] = _least_kept(
            logits[index],
            peaks[index],
            None if temperatures is None else temperatures[index],
            batch.top_k,
            batch.top_p,
        )
        weights.masked_fill_(logits < limits, 0)
    cumulated = weights.cumsum_(-1)
    # A share is at most 1 - 2^-53, so that its product with the total rounds to less than the
    # total: the token found exists and has weight.
    shares = batch.shares() * cumulated[:, -1:]
    return torch.searchsorted(cumulated, shares, right=True).squeeze(1)


def _weights(logits: Tensor, peaks: Tensor, temperatures: Tensor | None) -> Tensor:
    """Float64 exp((logit - peak) / temperature): probabilities but for their sum."""
    scaled = logits.double().sub_(peaks)
    if temperatures is not None:
        scaled.div_(temperatures)
    return scaled.exp_()


def _least_kept(
    logits: Tensor,
    peaks: Tensor,
    temperatures: Tensor | None,
    top_k: list[int],
    top_p: list[float],
) -> Tensor:
    """The least logit of each row that top-k (0: any number) and then top-p keep, `[n, 1]`."""
    ordered = _descending(logits)
    size = logits.shape[1]
    last = torch.tensor([min(k or size, size) - 1 for k in top_k], device=logits.device)
    least = ordered.gather(1, last[:, None])
    weights = _weights(ordered, peaks, temperatures).masked_fill_(ordered < least, 0)
    cumulated = weights.cumsum(-1)
    shares = torch.tensor(top_p, dtype=torch.float64, device=logits.device)[:, None]
    # Kept: those before which less than the share is cumulated; always the first.
    before = cumulated - weights
    kept = (before < shares * cumulated[:, -1:]).sum(-1, keepdim=True).clamp_(min=1)
    return torch.maximum(least, ordered.gather(1, kept - 1))


def _descending(logits: Tensor) -> Tensor:
    if logits.is_cuda:
        return logits.sort(dim=-1, descending=True).values
    # 30 times faster than torch.sort on a CPU, which always finds the permutation as well.
    return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)


def _add_logprobs(sampled: list[SampledToken], logits: Tensor, wanted: dict[int, int]) -> None:
    """Replace tokens by ones that have log-probabilities; `wanted`: their number, by row."""
    index = torch.tensor(list(wanted), device=logits.device)
    chosen = torch.tensor([[sampled[i].token_id] for i in wanted], device=logits.device)
    logprobs = logits[index].log_softmax(-1)
    own = logprobs.gather(1, chosen).flatten().tolist()
    best = logprobs.topk(min(max(wanted.values()), logits.shape[1]))
    values, tokens = best.values.tolist(), best.indices.tolist()
    for row, (i, k) in enumerate(wanted.items()):
        top = tuple(zip(tokens[row][:k], values[row][:k], strict=True))
        sampled[i] = SampledToken(sampled[i].token_id, own[row], top)
