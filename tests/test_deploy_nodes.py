"""The guide to several nodes: its scripts start a real run, its commands and figures are right."""

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_runs import DEMO, ONECAST, ROOT, completion, read_results, write_batch

from onecast.runtime.bench.nodes_model import Layout, Traffic, all_reduce, frame, gather
from onecast.runtime.config import add_run_options
from onecast.runtime.nodes import add_node_options

NODES = ROOT / "deploy" / "nodes"
SCRIPTS = sorted(NODES.glob("*.sh"))

# What stands in for a cluster's commands: both nodes are this machine.
STAND_INS = {
    "ssh": "#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done\n"
    'exec bash -c "$2"\n',
    "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\nlocalhost\\n'\n",
    "srun": '#!/bin/bash\nshift\nfor node in 0 1; do SLURM_NODEID=$node "$@" & done\n'
    "wait %1 && wait %2\n",
}


def option_names() -> set[str]:
    parser = argparse.ArgumentParser()
    add_run_options(parser)
    add_node_options(parser)
    return {name for action in parser._actions for name in action.option_strings}


def test_every_option_in_the_guide_and_the_scripts_is_one() -> None:
    known = option_names()
    known |= {"--nproc-per-node", "--master-addr", "--master-port"}  # torchrun's
    known |= {"--kill-on-bad-exit", "--requeue", "--nodes", "--ntasks-per-node"}  # Slurm's
    known |= {"--gpus-per-node", "--cpus-per-task", "--job-name"}
    for file in (*SCRIPTS, NODES / "README.md"):
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", file.read_text()))
        assert used - known == set(), file.name


def test_links_of_the_guide_lead_somewhere() -> None:
    for page in NODES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (NODES / target).exists(), f"{page.name}: {target}"
    for path in re.findall(
        r"\b(?:deploy|runtime|tests)/[\w./-]+\w", (NODES / "README.md").read_text()
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def model_of(operation: str, layout: Layout) -> Traffic:
    if operation == "all-reduce":
        return all_reduce(layout, 262_144)
    if operation == "gather":
        return gather(layout, 65_536)
    return frame(layout, operation.removeprefix("frame, "), 20_480)


def test_what_the_page_says_of_the_model_is_what_the_model_says() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (NODES / "growth.md").read_text().splitlines()
        if re.match(r"\| \S.* \| \d+ x \d+ \|", line)
    ]
    assert len(rows) == 28 + 20
    for operation, shape, *cells in rows:
        nodes, _, per_node = shape.partition(" x ")
        model = model_of(operation, Layout(int(nodes), int(per_node)))
        numbers = [int(cell.replace(",", "")) for cell in cells]
        expected = [model.num_messages(), sum(model.messages[0]), model.total()]
        if len(numbers) == 8:
            assert numbers[2::2] == numbers[3::2], "measured as modelled"
            expected += [model.total(), *2 * [model.between_nodes()], *2 * [max(model.by_rank())]]
        else:
            expected.append(model.between_nodes())
        assert numbers == [round(number) for number in expected], (operation, shape)


@pytest.mark.parametrize(
    ("script", "missing"), [("ssh.sh", "HOSTS"), ("slurm.sh", "SLURM_JOB_NODELIST")]
)
def test_a_script_says_what_it_lacks(script: str, missing: str) -> None:
    bare = {"PATH": os.environ["PATH"]}
    done = subprocess.run([NODES / script], env=bare, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f" {missing}: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ssh.sh", "slurm.sh"])
def test_a_script_starts_one_run_on_all_nodes(tmp_path: Path, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    batch = write_batch(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(3)])
    output = tmp_path / "out put.jsonl"
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "ONECAST": str(ONECAST),
        "HOSTS": "127.0.0.1 localhost",
        "SETTINGS": "GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1",
        "PORT": "29719",
        "SLURM_JOB_ID": "9720",
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    mode = ["generate"] if script == "ssh.sh" else []
    done = subprocess.run(
        [
            NODES / script,
            *mode,
            f"--model={DEMO}",
            f"--input={batch}",
            f"--output={output}",
            "--tp=2",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(result["custom_id"] for result in read_results(output)) == ["r0", "r1", "r2"]
    assert "2 tensor-parallel ranks" in done.stdout
