"""The settings of one run: read once from the command line, checked once, then frozen.

Owns the options of an engine, those of `onecast generate` around it and of the worker (they are the
same: the launcher hands its own on), their limits, and the only reading of environment variables in
the runtime. Knows nothing of torch, so that a wrong option is answered in milliseconds.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

DTYPES = ("auto", "float32", "bfloat16", "float16")
# These repeat what onecast.comm says, which would bring torch along; a test holds them equal.
TRANSPORTS = ("auto", "shared-memory", "two-level", "process-group")
PRIOR_PROTOCOLS = ("two-broadcasts", "fixed-metadata", "cached-size")
CHANNELS = (*TRANSPORTS, *PRIOR_PROTOCOLS)
ALL_REDUCES = ("auto", "shared-memory", "process-group")
DEFAULT_SPIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Model, ranks, memory, channels and telemetry of one run, whatever feeds it. Sizes are per
    rank."""

    MODE: ClassVar[tuple[str, ...]] = ()  # what the worker's command line begins with

    model: Path
    tp: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    channel: str = "auto"
    all_reduce: str = "auto"
    spin: float = DEFAULT_SPIN
    num_blocks: int | None = None
    num_host_blocks: int | None = None
    block_size: int = 16
    max_batch_tokens: int = 512
    max_batch_size: int = 64
    max_model_len: int | None = None
    no_chunked_prefill: bool = False
    no_prefix_caching: bool = False
    no_overlap: bool = False
    timeout_s: float = 120.0
    join_timeout_s: float = 600.0
    no_telemetry: bool = False
    metrics_host: str | None = None  # None, here and below: as the environment says
    metrics_port: int | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        self.check_range(_LEAST, _MOST)
        if self.all_reduce == "shared-memory" and self.device != "cpu":
            raise ValueError(f"--all-reduce: shared-memory needs --device cpu, not {self.device}")
        if self.no_telemetry and self.trace is not None:
            raise ValueError("--trace needs telemetry: leave out --no-telemetry")

    def context_limit(self, context: int) -> int:
        """Prompt and output tokens of a sequence, at most; ValueError above the model's context."""
        if self.max_model_len is None:
            return context
        if self.max_model_len > context:
            raise ValueError(
                f"--max-model-len: {self.max_model_len} is above the model's context of {context}"
            )
        return self.max_model_len

    def check_range(self, least: Mapping[str, float], most: Mapping[str, float]) -> None:
        """ValueError, naming option, value and limit, for a field out of its range."""
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and not value >= limit:
                raise ValueError(f"{_flag(name)}: {value} is below {limit}")
        for name, limit in most.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise ValueError(f"{_flag(name)}: {value} is above {limit}")

    def resumed(self) -> Self:
        """What a run goes on with when its ranks are started again: nothing done is done twice."""
        return self

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """The checked configuration; ValueError names the option, its value and the limit."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(options).items() if name in names})

    def to_argv(self) -> list[str]:
        """The options that make an equal configuration, for the worker processes."""
        argv: list[str] = [*self.MODE]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                argv += [_flag(field.name)] if value else []
            elif value is not None:
                argv += [f"{_flag(field.name)}={value}"]
        return argv


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(EngineConfig):
    """What one run of `onecast generate` does."""

    input: Path
    output: Path
    resume: bool = False
    overwrite: bool = False
    show: int = 0

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # a class with slots has no super() here
        self.check_range({"show": 0}, {})
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other: choose one")

    def resumed(self) -> "RunConfig":
        return dataclasses.replace(self, resume=True, overwrite=False)


_LEAST: dict[str, float] = {
    "tp": 1,
    "num_blocks": 1,
    "num_host_blocks": 0,
    "block_size": 1,
    "max_batch_tokens": 1,
    "max_batch_size": 1,
    "max_model_len": 1,
    "spin": 0,
    "timeout_s": 1,
    "join_timeout_s": 1,
    "metrics_port": 0,
}

_MOST: dict[str, float] = {
    "spin": 1,
    "timeout_s": 7 * 24 * 3600,
    "join_timeout_s": 7 * 24 * 3600,
    "metrics_port": 65535,
    # Beyond any model's context, and what arrays of a step can be made for.
    "block_size": 2**20,
    "max_batch_tokens": 2**24,
    "max_batch_size": 2**20,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class OptionAdder:
    """Adds the fields of a configuration to a parser, as options; `defaults` replace its own."""

    def __init__(
        self, parser: argparse.ArgumentParser, config: type[EngineConfig], **defaults: Any
    ) -> None:
        self._parser = parser
        self._known: dict[str, Any] = {
            field.name: field.default
            for field in dataclasses.fields(config)
            if field.default is not dataclasses.MISSING
        } | defaults

    def option(self, name: str, help_text: str, **kwargs: Any) -> None:
        if name in self._known:
            kwargs["default"] = self._known[name]
        else:
            kwargs["required"] = True
        self._parser.add_argument(_flag(name), help=help_text, **kwargs)

    def switch(self, name: str, help_text: str) -> None:
        self._parser.add_argument(
            _flag(name), action="store_true", help=help_text, default=self._known[name]
        )


def add_run_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add every option of `RunConfig`; `defaults` replace those of the dataclass."""
    add = OptionAdder(parser, RunConfig, **defaults)
    add.option("input", "OpenAI batch file (JSONL)", type=Path, metavar="FILE")
    add.option("output", "where the result lines go (JSONL)", type=Path, metavar="FILE")
    add_engine_options(add)
    add.switch("resume", "keep the results that are there and finish the rest")
    add.switch("overwrite", "replace an existing output file")
    add.option("show", "print this many prompts with their completions at the end", type=int)


def add_engine_options(add: OptionAdder) -> None:
    """Add every option of `EngineConfig`."""
    option, switch = add.option, add.switch
    option("model", "Hugging Face model directory", type=Path, metavar="DIR")
    option("tp", "tensor-parallel ranks (%(default)s)", type=int, metavar="N")
    option("device", "cpu or cuda (%(default)s)", choices=("cpu", "cuda"))
    option(
        "dtype",
        "compute type; auto: float32 on cpu, the checkpoint's on cuda (%(default)s)",
        choices=DTYPES,
    )
    option(
        "channel",
        "how a step reaches the ranks; the last three are what onecast is measured against "
        "(%(default)s)",
        choices=CHANNELS,
    )
    option(
        "all_reduce",
        "how ranks on the CPU sum; auto: through shared memory on one host (%(default)s)",
        choices=ALL_REDUCES,
    )
    option(
        "spin",
        "share of a core, 0 to 1, that a rank may burn waiting for others (%(default)s)",
        type=float,
    )
    option("num_blocks", "KV-cache blocks on the device (default: by memory)", type=int)
    option("num_host_blocks", "KV-cache blocks in host memory (default: as many)", type=int)
    option("block_size", "tokens in a KV-cache block (%(default)s)", type=int)
    option("max_batch_tokens", "tokens in one step, at most (%(default)s)", type=int)
    option("max_batch_size", "sequences in one step, at most (%(default)s)", type=int)
    option("max_model_len", "prompt and output tokens, at most (default: the model's)", type=int)
    switch("no_chunked_prefill", "never split a prompt over several steps")
    switch("no_prefix_caching", "compute all of a prompt, even where the cache has its beginning")
    switch("no_overlap", "do not plan a step before the one ahead of it is done")
    option("timeout_s", "longest wait for another rank, in seconds (%(default)s)", type=float)
    option(
        "join_timeout_s",
        "longest wait for the ranks of other nodes to come, at the beginning and after a restart "
        "(%(default)s)",
        type=float,
    )
    switch("no_telemetry", "measure nothing")
    option("metrics_host", "address to serve /metrics on (127.0.0.1)", metavar="HOST")
    option("metrics_port", "port to serve /metrics on; 0: any free one (0)", type=int)
    option("trace", "trace file for Jaeger's and Perfetto's pages", type=Path, metavar="FILE")


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """Who this process is, as torchrun says it, and what the launcher of `onecast` adds."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node: int
    run_id: str
    run_dir: str | None  # shared-memory directory to be made, as the launcher of `onecast` says
    launcher_pid: int | None  # the launcher of `onecast`, this process's parent
    several_ranks_per_gpu: bool
    master_addr: str = ""  # of the store in which ranks meet
    master_port: int = 0
    agent_store: bool = False  # the store is the launcher's; else rank 0 makes it
    restart_count: int = 0  # how often the launcher of this node has started its ranks again
    max_restarts: int = 0

    @property
    def launched_by_onecast(self) -> bool:
        return self.launcher_pid is not None


RUN_DIR_VARIABLE = "ONECAST_RUN_DIR"
LAUNCHER_PID_VARIABLE = "ONECAST_LAUNCHER_PID"


def rank_environment() -> RankEnvironment:
    """Read torchrun's variables; ValueError when this process was not launched by it."""
    environ = os.environ
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set: start workers with `onecast generate --tp N` or "
            "`torchrun --nproc-per-node N -m onecast.runtime.worker ...`"
        )
    return RankEnvironment(
        rank=int(environ["RANK"]),
        local_rank=int(environ["LOCAL_RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
        node=int(environ.get("GROUP_RANK", "0")),
        run_id=environ.get("TORCHELASTIC_RUN_ID", "onecast"),
        run_dir=environ.get(RUN_DIR_VARIABLE),
        launcher_pid=int(environ[LAUNCHER_PID_VARIABLE])
        if LAUNCHER_PID_VARIABLE in environ
        else None,
        several_ranks_per_gpu=several_ranks_per_gpu(),
        master_addr=environ.get("MASTER_ADDR", ""),
        master_port=int(environ.get("MASTER_PORT", "0")),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart_count=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        max_restarts=int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")),
    )


def several_ranks_per_gpu() -> bool:
    """NCCL 2.30 and later can put several ranks on one GPU when this is set."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
