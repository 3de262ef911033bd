"""What nodes must have alike: everything that changes what is computed, by the option's name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runs import DEMO

from onecast.runtime.config import EngineConfig, RunConfig
from onecast.runtime.serve_config import ServeConfig
from onecast.runtime.terms import disagreement, terms_of


def config(model: Path = DEMO, **options: Any) -> EngineConfig:
    return RunConfig(model=model, input=Path("in"), output=Path("out"), **options)


def between(one: EngineConfig, other: EngineConfig) -> str | None:
    """Of two ranks on node 0 and one on node 1."""
    return disagreement([terms_of(one), terms_of(one), terms_of(other)], [0, 0, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 1}, "--block-size: 16 on node 0, 1 on node 1"),
        ({"num_host_blocks": 0}, "--num-host-blocks: not given on node 0, 0 on node 1"),
        ({"no_overlap": True}, "--no-overlap: not given on node 0, given on node 1"),
        (
            {"dtype": "bfloat16", "channel": "two-broadcasts"},
            "--dtype: auto on node 0, bfloat16 on node 1; "
            "--channel: auto on node 0, two-broadcasts on node 1",
        ),
    ],
)
def test_what_differs_is_said_by_option_and_node(options: dict[str, Any], said: str) -> None:
    assert between(config(), config(**options)) == f"{said}; all nodes need the same"


def test_a_server_is_no_batch_run() -> None:
    said = between(config(), ServeConfig(model=DEMO))
    assert said == "command: generate on node 0, serve on node 1; all nodes need the same"


def test_what_is_a_nodes_own_may_differ(tmp_path: Path) -> None:
    elsewhere = shutil.copytree(DEMO, tmp_path / "elsewhere")
    options = {"timeout_s": 3, "metrics_port": 9464, "trace": tmp_path / "trace", "spin": 1}
    assert between(config(), config(elsewhere, **options)) is None


def test_a_checkpoint_of_the_same_shapes_with_other_weights_is_another(tmp_path: Path) -> None:
    other = shutil.copytree(DEMO, tmp_path / "other")
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    weights.write_bytes(data)
    said = between(config(), config(other))
    assert said is not None and said.startswith("--model: checkpoint ")


def test_a_node_of_another_version_is_refused_by_it() -> None:
    older = {"onecast": "0.0.1"}
    said = disagreement([terms_of(config()), older], [0, 1])
    assert said is not None and said.startswith("onecast: ") and "0.0.1 on node 1" in said
