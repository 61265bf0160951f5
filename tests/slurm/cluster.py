"""A real Slurm of one node on this host: own munge key, ports and folder, accounting off.

    with cluster(folder, cpus=2, gpus=2) as environment: subprocess.run(["sinfo"], env=environment)

Nothing of a Slurm that is installed here already is read or changed. Try it by hand:
`python tests/slurm/cluster.py` starts one and prints what to export, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
SECONDS = 60.0

# Where Slurm's commands look when SLURM_CONF is unset: inside its jobs the executor plugin removes
# every SLURM_* variable but a few, this one too, and its `srun` would find no cluster.
SYSTEM, FOUND = Path("/etc/slurm/slurm.conf"), Path("/run/slurm/conf")

# Memory and CPUs are what the file says (config_overrides), so that requests made for large
# machines are accepted; how many jobs run at once is left to `snakemake --jobs`.
CONF = """\
ClusterName=radbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """Why no Slurm can be started here."""


def install() -> None:
    """Debian's packages, where they are missing. Raises `Unavailable`."""
    if os.getuid() != 0:
        raise Unavailable("installing and starting Slurm needs root")
    missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"no {', '.join(missing)}, and no apt-get to install them with")
    # runlevel 1: services that come with the packages are not started
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Unavailable(f"apt-get {command[0]} failed: {' '.join(last)}")


@contextlib.contextmanager
def cluster(folder: Path, cpus: int, gpus: int) -> Iterator[dict[str, str]]:
    """Environment in which Slurm's commands reach a cluster that lives as long as the block.

    Its node has `cpus` CPUs and `gpus` GPUs that are no more than device files. Jobs left at the
    end are killed. Raises `Unavailable` when there is a Slurm already or a daemon does not start.
    """
    for path in (SYSTEM, FOUND):
        if os.path.lexists(path):
            raise Unavailable(f"this host has a Slurm of its own: {path}")
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("slurmctld", "slurmd"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(host=host, folder=folder, cpus=cpus, gpus=gpus, ports=_free_ports(2))
    )
    lines = []
    for number in range(gpus):
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        lines.append(f"Name=gpu File={folder}/gpu{number}\n")
    (folder / "gres.conf").write_text("".join(lines))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    files["seed-file"] = "munge.seed"
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    with contextlib.ExitStack() as stack:
        FOUND.parent.mkdir(parents=True, exist_ok=True)
        FOUND.symlink_to(folder)
        stack.callback(FOUND.unlink)
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", *options]
        stack.enter_context(_daemon(munged, environment, folder))
        _wait("munged", (folder / "munge.socket").exists, folder)
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            stack.enter_context(_daemon(command, environment, folder))
        _wait("slurmd", lambda: "idle" in _ask(["sinfo", "-h", "-o", "%T"], environment), folder)
        stack.callback(_drain, environment)
        yield environment


@contextlib.contextmanager
def _daemon(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us: jobs are cancelled first
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _drain(environment: dict[str, str]) -> None:
    """Cancel what still runs, so that no job outlives the cluster."""
    subprocess.run(["scancel", "--user=root"], env=environment)
    subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environment)
    until = time.monotonic() + SECONDS
    while _ask(["squeue", "-h"], environment) and time.monotonic() < until:
        time.sleep(0.5)


def _ask(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _wait(name: str, ready: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > until:
            logs = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
            said = "".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)
            raise Unavailable(f"{name} did not start within {SECONDS:.0f} s\n{said}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def main() -> int:
    """Keep a cluster for as long as somebody wants to play with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="rad-slurm-") as temporary:
        try:
            install()
            with cluster(Path(temporary, "cluster"), cpus=os.cpu_count() or 1, gpus=2) as found:
                print(f"export SLURM_CONF={found['SLURM_CONF']}   # until Ctrl-C", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    while True:
                        time.sleep(60)
        except Unavailable as reason:
            print(f"no Slurm here: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
