"""Two hosts on one machine: Linux network namespaces with separate hostnames, joined by a veth pair."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ranks import ENVIRONMENT, HERE, SMALL

PORT = 29400
CARD = "eth0"


def ip(*words: str) -> str:
    """Run iproute2's ``ip`` and return its output.

    Raises:
        subprocess.CalledProcessError: the command failed; ``stderr`` has its message.
    """
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


@dataclass
class Host:
    """One host: a network namespace."""

    name: str
    address: str
    names: Path
    """Hosts file with the addresses of both hosts, mounted as /etc/hosts."""

    def torchrun(
        self, endpoint: str, output_dir: Path, *flags: object, err: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start one of two ranks. ``endpoint`` is the rendezvous host, ``err`` the file for stderr."""
        as_host = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c",
                   'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"',
                   self.name, str(self.names)]  # fmt: skip
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint}:{PORT}", "--rdzv-id", "run",
                    "--monitor-interval", "0.1"]  # fmt: skip
        script = [str(HERE.parent / "run_pretrain.py"), *map(str, [*SMALL, *flags, "--output-dir", output_dir])]
        command, environment = [*as_host, *torchrun, *script], os.environ | ENVIRONMENT
        with err.open("w") if err else nullcontext(subprocess.PIPE) as stderr:
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def ranks(self) -> list[int]:
        """Return the process IDs of the training processes, the children of torchrun."""
        pids = map(int, ip("netns", "pids", self.name).split())
        return [pid for pid in pids if "torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_text()]

    def vanish(self) -> None:
        """Take the network interface down, as if the cable were unplugged: connections stay open, packets are lost."""
        ip("-n", self.name, "link", "set", CARD, "down")

    def remove(self) -> None:
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", self.name)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Create two hosts that reach only each other; their hosts file is in ``folder``.

    Raises:
        OSError: network namespaces cannot be created; the message gives the reason.
    """
    if missing := [command for command in ("ip", "unshare") if not shutil.which(command)]:
        raise OSError(f"no {' and no '.join(missing)} command (iproute2, util-linux)")
    if os.geteuid() != 0:
        raise OSError("network namespaces need root")
    names = folder / "hosts"
    hosts = [
        Host(f"dino{os.getpid()}{letter}", f"10.213.77.{number}", names) for number, letter in ((1, "a"), (2, "b"))
    ]
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    made: list[Host] = []
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
                made.append(host)
            ip("link", "add", CARD, "netns", hosts[0].name, "type", "veth", "peer", CARD, "netns", hosts[1].name)
            for host in hosts:
                ip("-n", host.name, "address", "add", f"{host.address}/30", "dev", CARD)
                ip("-n", host.name, "link", "set", CARD, "up")
                ip("-n", host.name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield hosts[0], hosts[1]
    finally:
        for host in made:
            host.remove()
