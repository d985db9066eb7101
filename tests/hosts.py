"""Two hosts to be reached by ssh: two servers on loopback addresses, with keys and settings of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil

from tests.distributed.spawn import free_port
from tests.runs import ROOT, environment

ADDRESSES = {"first": "127.0.0.2", "second": "127.0.0.3"}
NEEDED = ("sshd", "ssh", "ssh-keygen", "pdsh", "pkill")
SYSTEM = "/usr/sbin:/sbin"  # where sshd is, though not on everybody's PATH
SEPARATION = Path("/run/sshd")  # sshd wants this folder when root starts it
SERVER = """
ListenAddress {address}:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
CLIENT = """
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""


def missing() -> str:
    """Which of the programs is not there; empty = all are."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM}") is None]
    return f"{', '.join(absent)} not installed" if absent else ""


class Hosts:
    """Both servers, while entered; everything they need lies in `folder`.

    `python` is this Python under a path in `folder`: when it is stopped, DeepSpeed ends (`pkill -f`) every launch.py on
    a host that runs under the path of its own Python, and other tests may have some.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "python" / "bin" / "python"
        self.hostfile = folder / "hostfile"
        self._servers: list[subprocess.Popen[bytes]] = []
        self._separation = False

    def __enter__(self) -> Hosts:
        self.python.parent.mkdir(parents=True)
        self.python.symlink_to(sys.executable)
        (self.python.parents[1] / "lib").symlink_to(Path(sys.prefix) / "lib")
        if (settings := Path(sys.prefix) / "pyvenv.cfg").exists():
            shutil.copy(settings, self.python.parents[1])
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in ADDRESSES))
        (self.folder / "env").write_text("".join(f"{name}={value}\n" for name, value in self._of_ranks().items()))
        if os.geteuid() == 0 and not SEPARATION.exists():
            SEPARATION.mkdir(mode=0o755)
            self._separation = True
        client = CLIENT.format(folder=self.folder)
        for name, address in ADDRESSES.items():
            port = free_port()
            self._serve(name, SERVER.format(folder=self.folder, address=address, port=port), (address, port))
            client += f"Host {name}\n  HostName {address}\n  Port {port}\n"
        (self.folder / "client").write_text(client)
        ssh = self.folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/client "$@"\n')
        ssh.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes():
            process.kill()
        for server in self._servers:
            server.kill()
            server.wait()
        if self._separation:
            SEPARATION.rmdir()

    def environment(self) -> dict[str, str]:
        """Of a command that reaches the hosts: `ssh` knows them, `deepspeed` knows what to set there."""
        own = environment()
        return {**own, "PATH": f"{self.folder}/bin:{own['PATH']}", "DS_ENV_FILE": f"{self.folder}/env"}

    def on(self, host: str, *command: str) -> list[str]:
        """`command`, with what ranks need, in the repository's folder of a host."""
        own = [f"{name}={value}" for name, value in self._of_ranks().items()]
        return ["ssh", host, f"cd {ROOT} && {shlex.join(['env', *own, *command])}"]

    def processes(self) -> list[psutil.Process]:
        """What runs on the hosts or has been started to reach them; not the servers."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass  # it has just ended
        return [process for process in found if process.pid not in {os.getpid(), *(own.pid for own in self._servers)}]

    def wait_until_gone(self, seconds: float) -> None:
        """Until there is no such process.

        Raises:
            AssertionError: some are left after so many seconds.
        """
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, f"left after {seconds} s: {left}"
            time.sleep(0.1)

    def _of_ranks(self) -> dict[str, str]:
        own = environment()
        names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS")
        return {**{name: own[name] for name in names}, "GLOO_SOCKET_IFNAME": "lo"}

    def _serve(self, name: str, settings: str, place: tuple[str, int]) -> None:
        path = self.folder / f"{name}.sshd"
        path.write_text(settings)
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:{SYSTEM}")
        assert sshd is not None
        with (self.folder / f"{name}.log").open("wb") as log:
            self._servers.append(subprocess.Popen([sshd, "-D", "-e", "-f", str(path)], stdout=log, stderr=log))
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(place, timeout=1).close()
                return
            except OSError:
                said = (self.folder / f"{name}.log").read_text()
                assert self._servers[-1].poll() is None, f"sshd ended: {said}"
                assert time.monotonic() < end, f"sshd does not answer: {said}"
                time.sleep(0.1)
