"""`onecast generate` on rank 0: a batch file, the engine around this rank, a progress bar.

Owns what is around the engine in a batch run, and the counting of its figures.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .assembly import make_engine
from .batch_file import BatchWriter, check_unchanged, count_lines, read_batch
from .batch_job import BatchJob
from .body_context import body_context
from .config import RunConfig
from .engine import Engine
from .model_config import ModelConfig
from .openai_body import Call
from .rank import Rank
from .summary import RunFigures
from .tokenizer import Tokenizer

_QUEUE_FACTOR = 2  # sequences kept ready, as a multiple of those in one step
_FUSED = ("process-group", "two-level")  # channels of one broadcast a frame, if there is any


def generate(config: RunConfig, rank: Rank) -> RunFigures:
    """Answer `config.input` into `config.output`; `rank` is the driver's.

    Every result is on disk when this returns or raises; see `batch_file` for what a kill leaves.
    """
    model = ModelConfig.from_dir(config.model)
    tokenizer = Tokenizer(config.model)
    num_lines = count_lines(config.input)
    with BatchWriter(config.output, resume=config.resume, overwrite=config.overwrite) as writer:
        if writer.done:
            check_unchanged(config.input, writer.done)
        engine = make_engine(config, rank, model, tokenizer)
        figures = RunFigures(output=config.output, trace=config.trace)
        with _progress_bar() as progress:
            task = progress.add_task("requests", total=num_lines, completed=len(writer.done))

            def on_result(call: Call | None, texts: list[str]) -> None:
                progress.advance(task)
                figures.requests += 1
                figures.failed_requests += call is None
                if call is not None and len(figures.shown) < config.show:
                    prompt = tokenizer.decode(call.requests[0].prompt_token_ids)
                    figures.shown.append((prompt, texts))

            job = BatchJob(
                read_batch(config.input, writer.done),
                writer,
                engine,
                body_context(engine.scheduler.config, tokenizer, model, config.model.name),
                created_s=int(time.time()),
                max_queued=_QUEUE_FACTOR * config.max_batch_size,
                on_result=on_result,
            )
            start_s = time.perf_counter()
            job.run()
            figures.elapsed_s = time.perf_counter() - start_s
    _count(figures, engine, rank)
    return figures


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _count(figures: RunFigures, engine: Engine, rank: Rank) -> None:
    counters = engine.scheduler.counters
    figures.prompt_tokens = counters.prompt_tokens
    figures.generated_tokens = counters.generated_tokens
    figures.steps = engine.frames.count
    figures.channel = rank.channel.name
    figures.all_reduce = "" if rank.all_reduce is None else rank.all_reduce.name
    figures.broadcasts = rank.channel.broadcasts
    if figures.channel in _FUSED and figures.broadcasts:
        figures.growth_steps = figures.broadcasts - figures.steps  # a second one for the rest
    figures.frame_bytes = engine.frames.frame_bytes
    figures.metadata_bytes = engine.frames.metadata_bytes
    figures.swapped_out = counters.swapped_out
    figures.swapped_in = counters.swapped_in
    figures.copied = counters.copied
    figures.recomputes = counters.recomputes
    if engine.scheduler.config.prefix_caching:
        figures.prefix_queried_tokens = counters.prefix_queried_tokens
        figures.prefix_hit_tokens = counters.prefix_hit_tokens
    figures.ranks = rank.environment.world_size
