"""``cures dashboard``: Prometheus and Grafana for the Ray cluster on this machine, with the board of a run.

    Ray's nodes --/metrics--> Prometheus (Ray's file names the nodes) --> Grafana: folder "CurES", board "CurES on Ray"

Prometheus and Grafana are programs of their own (Debian: ``apt install prometheus``). What is missing is said.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from actors.commands.board import board
from cures_ray.messages import ConfigError

DISCOVERY = "prom_metrics_service_discovery.json"  # in Ray's folder, kept up to date by Ray


def prometheus_settings(ray_folder: Path, every_s: int = 5) -> str:
    """prometheus.yml that follows Ray's nodes.

    Raises:
        ConfigError: no Ray has been started with ``ray_folder`` as its folder.
    """
    discovery = ray_folder / DISCOVERY
    if not discovery.exists():
        raise ConfigError(
            f"{discovery} does not exist: start Ray first (ray start --head, or a run with ray.dashboard=true), or "
            f"name its folder with --ray-dir"
        )
    jobs = [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]}]
    every = {"scrape_interval": f"{every_s}s", "evaluation_interval": f"{every_s}s"}
    return yaml.safe_dump({"global": every, "scrape_configs": jobs})


def prometheus_command(program: str, folder: Path, port: int) -> list[str]:
    return [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]


def grafana_settings(folder: Path, prometheus_port: int, port: int) -> Path:
    """Provisioning of data source and board; the ini file."""
    provisioning = folder / "grafana" / "provisioning"
    for part in ("datasources", "dashboards", "plugins", "alerting"):
        (provisioning / part).mkdir(parents=True, exist_ok=True)
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "url": f"http://127.0.0.1:{prometheus_port}",
        "isDefault": True,
    }
    (provisioning / "datasources" / "prometheus.yml").write_text(
        yaml.safe_dump({"apiVersion": 1, "datasources": [source | {"access": "proxy"}]})
    )
    provider = {"name": "CurES", "folder": "CurES", "type": "file", "options": {"path": str(folder / "boards")}}
    (provisioning / "dashboards" / "cures.yml").write_text(yaml.safe_dump({"apiVersion": 1, "providers": [provider]}))
    ini = folder / "grafana" / "grafana.ini"
    ini.write_text(
        f"[server]\nhttp_addr = 127.0.0.1\nhttp_port = {port}\n[paths]\ndata = {folder / 'grafana'}\n"
        f"provisioning = {provisioning}\n[auth.anonymous]\nenabled = true\n"
    )
    return ini


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--ray-dir", type=Path, default=Path(tempfile.gettempdir()) / "ray", help="Ray's folder")
    parser.add_argument("--dir", type=Path, default=Path("runs/dashboard"), help="settings and data of the servers")
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--scrape-s", type=int, default=5, help="seconds between two looks of Prometheus")
    parser.add_argument("--grafana-port", type=int, default=3000)
    parser.add_argument("--write-only", action="store_true", help="write board and settings, start nothing")
    args = parser.parse_args(argv)
    folder = args.dir.resolve()
    (folder / "boards").mkdir(parents=True, exist_ok=True)
    (folder / "boards" / "cures.json").write_text(board() + "\n")
    print(f"board        {folder / 'boards' / 'cures.json'}   (Grafana: Dashboards, New, Import)")
    (folder / "prometheus.yml").write_text(prometheus_settings(args.ray_dir, args.scrape_s))
    print(f"settings     {folder / 'prometheus.yml'}")
    print(f"Ray's own Grafana takes the board too: RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR={folder / 'boards'}")
    if args.write_only:
        return 0
    return serve(folder, args.prometheus_port, args.grafana_port)


def serve(folder: Path, prometheus_port: int, grafana_port: int) -> int:
    """Run what is installed until Ctrl-C; exit code 1 when one of the servers ends."""
    prometheus, grafana = shutil.which("prometheus"), shutil.which("grafana-server") or shutil.which("grafana")
    if prometheus is None:
        raise ConfigError("prometheus is not installed (Debian: apt install prometheus); nothing was started")
    servers = {"Prometheus": subprocess.Popen(prometheus_command(prometheus, folder, prometheus_port))}
    print(f"Prometheus   http://127.0.0.1:{prometheus_port}")
    if grafana is not None:
        ini = grafana_settings(folder, prometheus_port, grafana_port)
        command = [grafana, *(["server"] if grafana.endswith("grafana") else []), f"--config={ini}"]
        servers["Grafana"] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        print(f"Grafana      http://127.0.0.1:{grafana_port}/d/cures")
    else:
        print("Grafana      not installed; import the board into any Grafana whose data source is this Prometheus")
    print("Ctrl-C ends both.", flush=True)
    try:
        while True:
            time.sleep(1.0)
            for name, server in servers.items():
                if server.poll() is not None:
                    print(f"{name} ended with exit code {server.returncode}; is its port taken?")
                    return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            server.wait(timeout=20)
