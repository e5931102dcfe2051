"""The KubeRay manifest and the Slurm script, as far as can be checked without either: shape, syntax, the command."""

import os
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import yaml

from actors.cluster.roles import roles
from actors.commands.dry_run import dry_run
from cures_ray.config_load import load_config

ROOT = Path(__file__).resolve().parents[2]
RAYJOB = yaml.safe_load((ROOT / "configs" / "cluster" / "rayjob.yaml").read_text())
SLURM = ROOT / "configs" / "cluster" / "slurm.sh"


def checked(command: list[str], path: str, *machine: str) -> tuple:
    """Dry-run ``cures train PATH override...``; (configuration, its dry run)."""
    start = command.index("train")
    assert command[start - 1].endswith("cures") and command[start + 1] == path
    overrides = [word for word in command[start + 2 :] if word != "ray.address=auto"]
    config = load_config(ROOT / "configs" / Path(path).name, [*overrides, "ray.address=null", *machine])
    return config, "\n".join(dry_run(config, with_inputs=False))


def test_the_rayjob_has_the_shape_that_kuberay_asks_for():
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = RAYJOB["spec"]
    known = {"entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes"}
    assert set(spec) == known | {"ttlSecondsAfterFinished", "rayClusterSpec"}
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")  # KubeRay wants the image's
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources", "volumeMounts"} <= set(container)
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and group["groupName"]


def test_the_rayjobs_command_fits_its_cluster_and_keeps_the_learner_off_spot_nodes():
    command = shlex.split(RAYJOB["spec"]["entrypoint"])
    config, text = checked(command, "/app/configs/two-node.yaml", "ray.num_cpus=72", "ray.num_gpus=16")
    assert config.placement.learner_resources == {"on_demand": 1} and "# placement" in text
    learner = next(r for r in roles(config, 16) if r.name == "learner")
    offered = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]["resources"]
    assert yaml.safe_load(yaml.safe_load(offered)) == {"on_demand": learner.count}
    assert Path(config.checkpoint.dir).is_absolute()


def test_a_stopped_job_has_time_for_its_checkpoint():
    environment = yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_the_slurm_script_parses_and_the_command_inside_is_one_that_runs(tmp_path):
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0
    for name, text in {"scontrol": "echo node1; echo node2", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "12345"}
    slurm |= {"SLURM_JOB_NUM_NODES": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SLURM), "configs/two-node.yaml", "learner.lr=2e-6"],
        env=slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[words.index("--address") + 1] == "node1:22345" and words[words.index("--min-nodes") + 1] == "2"
    assert words.index(".venv/bin/ray") < words.index("symmetric-run") < words.index("--")
    config, _ = checked(words[words.index("--") + 1 :], "configs/two-node.yaml", "ray.num_cpus=128", "ray.num_gpus=16")
    assert config.learner.lr == 2e-6 and config.checkpoint.dir == f"{ROOT}/runs/two-node"
