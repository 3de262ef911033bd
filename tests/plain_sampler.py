"""A sampler that remembers nothing from step to step: what `Sampler` must equal, token by token."""

import numpy as np
import torch
from torch import Tensor

from onecast.runtime.request import SampledToken, Sequence

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]  # 32-bit words, wide enough to multiply


class PlainSampler:
    """Draws one token per sequence."""

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> list[SampledToken]:
        """Sequence i draws from row `rows[i]` of `logits` (float32 `[R, vocab]`).

        A token is kept by top-k if fewer than k are more likely, and by top-p if those more likely
        hold less than p together: equals are kept or dropped together. Log-probabilities are of
        the logits as they are, before temperature and filters.

        Raises FloatingPointError, naming the request, where logits are not finite.
        """
        if not sequences:
            return []
        if rows != list(range(logits.shape[0])):
            logits = logits[torch.tensor(rows, device=logits.device)]
        peaks = logits.amax(-1, keepdim=True)  # NaN where any of the row is
        _check_finite(peaks, sequences)
        drawn = [i for i, s in enumerate(sequences) if s.request.params.temperature > 0]
        if len(drawn) == len(sequences):
            tokens = _draw(logits, peaks, sequences)
        else:
            tokens = logits.argmax(-1)
            if drawn:
                index = torch.tensor(drawn, device=logits.device)
                tokens[index] = _draw(logits[index], peaks[index], [sequences[i] for i in drawn])
        sampled = [SampledToken(token) for token in tokens.tolist()]
        _add_logprobs(sampled, logits, sequences)
        return sampled


def _check_finite(peaks: Tensor, sequences: list[Sequence]) -> None:
    finite = peaks.isfinite().flatten()
    if not bool(finite.all()):
        number = int(finite.logical_not().nonzero()[0])
        sequence = sequences[number]
        raise FloatingPointError(
            f"the logits of request {sequence.request.request_id!r} at token "
            f"{sequence.num_tokens} are not finite (maximum {peaks[number].item()})"
        )


def _draw(logits: Tensor, peaks: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token per row: the first whose cumulated weight exceeds a uniform share of the total.

    All of it is done row by row: a row's token does not depend on the other rows.
    """
    params = [sequence.request.params for sequence in sequences]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64)
    temperatures = temperatures.to(logits.device)[:, None]
    weights = _weights(logits, peaks, temperatures)
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if filtered:
        index = torch.tensor(filtered, device=logits.device)
        limits = torch.full_like(peaks, -torch.inf)
        limits[index] = _least_kept(
            logits[index],
            peaks[index],
            temperatures[index],
            [params[i].top_k or logits.shape[1] for i in filtered],
            [params[i].top_p for i in filtered],
        )
        weights.masked_fill_(logits < limits, 0)
    cumulated = weights.cumsum_(-1)
    shares = torch.from_numpy(uniforms(sequences)).to(logits.device)[:, None]
    # A share is at most 1 - 2^-53, so that its product with the total rounds to less than the
    # total: the token found exists and has weight.
    return torch.searchsorted(cumulated, shares * cumulated[:, -1:], right=True).squeeze(1)


def _weights(logits: Tensor, peaks: Tensor, temperatures: Tensor) -> Tensor:
    """Float64 exp((logit - peak) / temperature): probabilities but for their sum."""
    return logits.double().sub_(peaks).div_(temperatures).exp_()


def _least_kept(
    logits: Tensor, peaks: Tensor, temperatures: Tensor, top_k: list[int], top_p: list[float]
) -> Tensor:
    """The least logit of each row that top-k and then top-p keep, `[n, 1]`."""
    ordered = _descending(logits)
    last = torch.tensor([min(k, logits.shape[1]) - 1 for k in top_k], device=logits.device)
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


def uniforms(sequences: list[Sequence]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number in [0, 1) per sequence, from its seed and its number of generated tokens."""
    keys = np.array([(s.request.params.seed + s.index) % 2**64 for s in sequences], dtype=np.uint64)
    counts = np.array([len(s.output) for s in sequences], dtype=np.uint64)
    zeros = np.zeros_like(counts)
    first, second, _, _ = philox((counts, zeros, zeros, zeros), (keys & _LOW, keys >> _32))
    wide: Words = (first << _32 | second) >> np.uint64(11)
    return wide.astype(np.float64) * 2.0**-53


_32 = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al., SC11): a counter-based generator, for many counters at once."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> _32 ^ c1 ^ k0, p1 & _LOW, p0 >> _32 ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + np.uint64(0x9E3779B9) & _LOW, k1 + np.uint64(0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _add_logprobs(sampled: list[SampledToken], logits: Tensor, sequences: list[Sequence]) -> None:
    """Replace the tokens of sequences that want log-probabilities by ones that have them."""
    wanted = {i: k for i, s in enumerate(sequences) if (k := s.request.params.logprobs) is not None}
    if not wanted:
        return
    index = torch.tensor(list(wanted), device=logits.device)
    chosen = torch.tensor([[sampled[i].token_id] for i in wanted], device=logits.device)
    logprobs = logits[index].log_softmax(-1)
    own = logprobs.gather(1, chosen).flatten().tolist()
    best = logprobs.topk(min(max(wanted.values()), logits.shape[1]))
    values, tokens = best.values.tolist(), best.indices.tolist()
    for row, (i, k) in enumerate(wanted.items()):
        top = tuple(zip(tokens[row][:k], values[row][:k], strict=True))
        sampled[i] = SampledToken(sampled[i].token_id, own[row], top)
